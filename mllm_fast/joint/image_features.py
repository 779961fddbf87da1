"""The only interface to a VLM's vision tower, which makes the VLM read given image embeddings in place of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..core.errors import InputError
from ..runtime.hooks import model_lock

if TYPE_CHECKING:
    from ..vlm import VLM


@contextmanager
def given_features(vlm: VLM, features: Tensor) -> Iterator[None]:
    """Context manager in which the model reads given image embeddings in place of its own.

    The vision tower does not run inside. Other threads wait. On exit, also by an exception, the model is restored.

    Args:
        vlm: The model.
        features: The image embeddings, [images, tokens, d], in the order of the images.

    Raises:
        InputError: If the number of image tokens depends on the image.
    """
    check_fixed_grid(vlm)
    model: Any = vlm.model.model
    left = features.to(vlm.model.dtype)

    def get_image_features(pixel_values: Tensor, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        if len(pixel_values) != len(left):
            raise RuntimeError(f"{len(left)} images were seen, the model reads {len(pixel_values)}")
        return BaseModelOutputWithPooling(pooler_output=vlm.adapter.image_features(left))

    with model_lock(vlm.text):
        if "get_image_features" in vars(model):
            raise RuntimeError("this model is reading given features already; leave that block first")
        model.get_image_features = get_image_features
        try:
            yield
        finally:
            del model.get_image_features


def own_features(vlm: VLM, inputs: Any) -> Tensor:
    """Compute image embeddings with the model's own vision tower and projector, [images, tokens, d].

    Args:
        vlm: The model.
        inputs: The inputs that the processor made.

    Raises:
        InputError: If the number of image tokens depends on the image.
    """
    check_fixed_grid(vlm)
    found = vlm.model.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True).pooler_output
    return found if isinstance(found, Tensor) else torch.stack(list(found))


def check_fixed_grid(vlm: VLM) -> None:
    """Raise InputError if the number of image tokens depends on the image."""
    if not vlm.adapter.fixed_grid or getattr(vlm.processor, "image_break_token", None):
        raise InputError(
            f"a joint model needs a language model that gives every image the same grid of tokens; the grid of"
            f" {vlm.model.config.model_type} varies with the image"
        )
