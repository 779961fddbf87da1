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

    model_types: tuple[str, ...] = ("qwen3_5", "qwen3_5_moe", "glm4v", "glm4v_moe", "kimi_k25")

    def tiles(self, processor: Any, inputs: Any, index: int, size: tuple[int, int]) -> Tiling:
        frames, rows, cols = (int(n) for n in inputs["image_grid_thw"][index])
        merge = processor.image_processor.merge_size
        if frames != 1:
            raise InputError(f"image {index} has {frames} frames; give one still image")
        width, height = size
        return Tiling((Tile(rows // merge, cols // merge, (0.0, 0.0, float(width), float(height))),))


@architecture
class QwenVideo(Qwen2VL):
    """Those whose videos are known as well: some frames, mostly two, are merged to one grid of tokens."""

    model_types = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")

    def moments(
        self, processor: Any, inputs: Any, index: int, frames: int, size: tuple[int, int]
    ) -> list[tuple[range, Tiling]]:
        groups, rows, cols = (int(n) for n in inputs["video_grid_thw"][index])
        videos, (width, height) = processor.video_processor, size
        merge, merged = videos.merge_size, videos.temporal_patch_size
        tiling = Tiling((Tile(rows // merge, cols // merge, (0.0, 0.0, float(width), float(height))),))
        # the last frame is repeated where frames are missing
        return [(range(i * merged, min((i + 1) * merged, frames)), tiling) for i in range(groups)]
