"""LLaVA 1.5 and ViP-LLaVA: one tile per image, resized and cropped to a square."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..core.errors import InputError
from ..core.layout import Tile, Tiling
from .adapter import Adapter
from .architectures import architecture
from .pixtral import pixtral_lengths, pixtral_tiles


@architecture
class Llava(Adapter):
    """LLaVA and ViP-LLaVA, and Pixtral, whose model type is LLaVA's."""

    model_types = ("llava", "vipllava")
    fixed_grid = True

    def tiles(self, processor: Any, inputs: Any, index: int, size: tuple[int, int]) -> Tiling:
        if getattr(processor, "image_break_token", None):
            return pixtral_tiles(processor, inputs, index, size)
        if getattr(processor.image_processor, "do_pad", False):
            raise InputError("the processor pads images to squares (do_pad), which is not supported; set it to False")
        height, width = inputs["pixel_values"].shape[-2:]
        patch = processor.patch_size
        box = cropped_box(processor.image_processor, size, (width, height))
        return Tiling((Tile(height // patch, width // patch, box),))

    def image_lengths(self, processor: Any, inputs: Mapping[str, Any], tokens: int) -> list[int] | None:
        """Return the same number of tokens for every image; one image may directly follow another."""
        if getattr(processor, "image_break_token", None):
            return pixtral_lengths(processor, inputs)
        pixels = inputs.get("pixel_values")
        return None if pixels is None else [tokens // len(pixels)] * len(pixels)

    def image_features(self, embeddings: torch.Tensor) -> Any:
        """Return one tensor per image."""
        return list(embeddings)


def cropped_box(images: Any, size: tuple[int, int], seen: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return the part of the original image that remains after "resize the short edge, crop the centre"."""
    width, height = size
    edge = images.size.get("shortest_edge") if getattr(images, "do_resize", False) else None
    if not getattr(images, "do_center_crop", False):
        return 0.0, 0.0, float(width), float(height)
    if edge is not None:
        short, long = min(width, height), max(width, height)
        resized = (edge, int(edge * long / short)) if width <= height else (int(edge * long / short), edge)
    elif getattr(images, "do_resize", False):
        resized = (images.size["width"], images.size["height"])
    else:
        resized = (width, height)
    # like transformers' center_crop, which cuts the odd pixel off at the right and at the bottom
    left, top = (resized[0] - seen[0]) // 2, (resized[1] - seen[1]) // 2
    x, y = width / resized[0], height / resized[1]
    return left * x, top * y, (left + seen[0]) * x, (top + seen[1]) * y
