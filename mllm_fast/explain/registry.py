"""Ways to draw a map of what one word hangs on: each a module of its name, with

    image_values(ex: Explanation, token: int, image: ImageLayout, heads: Heads) -> Tensor

a number an image token, [n]. `heads` matters to the log-probability increase alone.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from torch import Tensor

from .names import DEFAULT

METHODS = (DEFAULT, "attention", "rollout", "relevancy", "tam", "gradient-input", "random", "exhaustive")
ALIGNMENT = "gradient-alignment"
WITH_DETECTOR = (*METHODS, ALIGNMENT)  # for explanations by a joint model
MEANINGS = {  # of a map's numbers
    "logprob": "increase of log p(token) by each patch, summed over the best heads",
    "attention": "mean attention over all layers and heads",
    "rollout": "attention rollout",
    "relevancy": "gradient-weighted attention",
    "tam": "token activation map",
    "gradient-input": "gradient times input",
    "random": "chance",
    "exhaustive": "fall of log p(token) without each patch",
    ALIGNMENT: "largest weight among the detector's boxes over a pixel (gradient alignment)",
}


_MODULES = {
    "attention": "mean_attention",
    "exhaustive": "occlusion",
    "gradient-alignment": "gradient_alignment",
    "gradient-input": "gradient_x_input",
    "logprob": "logprob_increase",
    "random": "random_baseline",
}


def find(method: str) -> Callable[..., Tensor]:
    """The function that draws the map."""
    return import_module(f".methods.{_MODULES.get(method, method)}", __package__).image_values
