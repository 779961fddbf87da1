"""Pixtral's processor: one tile per image in the image's own shape, with a mark behind each row of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core.layout import Tile, Tiling
from .adapter import Adapter
from .architectures import architecture


def pixtral_tiles(processor: Any, inputs: Any, index: int, size: tuple[int, int]) -> Tiling:
    """Return the tile of an image that was resized to whole patches. The marks between rows are no image tokens."""
    side = processor.patch_size * processor.spatial_merge_size
    height, width = (int(n) for n in inputs["image_sizes"][index])
    return Tiling((Tile(height // side, width // side, (0.0, 0.0, float(size[0]), float(size[1]))),))


def pixtral_lengths(processor: Any, inputs: Mapping[str, Any]) -> list[int] | None:
    """Return how many tokens each image has, marks between rows not counted."""
    sizes, side = inputs.get("image_sizes"), processor.patch_size * processor.spatial_merge_size
    return None if sizes is None else [int(height) // side * (int(width) // side) for height, width in sizes]


@architecture
class Mistral3(Adapter):
    """Mistral 3 and its relatives with Pixtral's processor."""

    model_types = ("mistral3",)

    def tiles(self, processor: Any, inputs: Any, index: int, size: tuple[int, int]) -> Tiling:
        return pixtral_tiles(processor, inputs, index, size)

    def image_lengths(self, processor: Any, inputs: Mapping[str, Any], tokens: int) -> list[int] | None:
        return pixtral_lengths(processor, inputs)
