"""Qwen2-VL and its relatives: one tile per image, with a number of tokens that depends on the size of the image."""

from __future__ import annotations

from typing import Any

from ..core.errors import InputError
from ..core.layout import Tile, Tiling
from .adapter import Adapter
from .architectures import architecture


@architecture
class Qwen2VL(Adapter):
    """Architectures whose processor says how many patches each image has, before some are merged to a token."""

    model_types = (
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "qwen3_vl_moe",
        "qwen3_5",
        "qwen3_5_moe",
        "glm4v",
        "glm4v_moe",
        "kimi_k25",
    )

    def tiles(self, processor: Any, inputs: Any, index: int, size: tuple[int, int]) -> Tiling:
        frames, rows, cols = (int(n) for n in inputs["image_grid_thw"][index])
        merge = processor.image_processor.merge_size
        if frames != 1:
            raise InputError(f"image {index} has {frames} frames; give one still image")
        width, height = size
        return Tiling((Tile(rows // merge, cols // merge, (0.0, 0.0, float(width), float(height))),))
