"""Ways to draw a map of what one word hangs on: each a module of its name, with

    image_values(ex: Explanation, token: int, image: ImageLayout, heads: Heads) -> Tensor

a number an image token, [n]. `heads` matters to the log-probability increase alone.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from torch import Tensor

METHODS = ("logprob", "attention", "rollout", "relevancy", "tam", "gradient-input", "random", "exhaustive")


def find(method: str) -> Callable[..., Tensor]:
    """The function that draws the map."""
    return import_module(f".{method.replace('-', '_')}", __package__).image_values
