"""Qwen2.5-VL: one tile per image, with a number of tokens that depends on the size of the image."""

from __future__ import annotations

from typing import Any

from ..core.errors import InputError
from ..core.layout import Tile
from .adapter import Adapter, Tiling
from .architectures import architecture


@architecture
class Qwen25VL(Adapter):
    """Qwen2.5-VL, which keeps the offset of its rotary positions in the model."""

    model_type = "qwen2_5_vl"
    text_types = ("qwen2_5_vl_text",)
    state = ("model.rope_deltas",)

    def tiles(self, processor: Any, inputs: Any, index: int, size: tuple[int, int]) -> Tiling:
        frames, rows, cols = (int(n) for n in inputs["image_grid_thw"][index])
        merge = processor.image_processor.merge_size
        if frames != 1:
            raise InputError(f"image {index} has {frames} frames; give one still image")
        width, height = size
        return (Tile(rows // merge, cols // merge, (0.0, 0.0, float(width), float(height))),), (1, 1)
