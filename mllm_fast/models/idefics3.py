"""Idefics3 and SmolVLM: square tiles side by side, each behind a mark, and a view of the whole image last."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from ..core.layout import Tile, Tiling, side_by_side
from .adapter import Adapter, whole_frames
from .architectures import architecture


@architecture
class Idefics3(Adapter):
    """Idefics3."""

    model_types: tuple[str, ...] = ("idefics3",)

    def tiles(self, processor: Any, inputs: Any, index: int, size: tuple[int, int]) -> Tiling:
        side, (width, height) = math.isqrt(processor.image_seq_len), size
        whole = Tile(side, side, (0.0, 0.0, float(width), float(height)))
        rows, cols = _splits(processor.image_processor, size)
        if rows == cols == 1:
            return Tiling((whole,))
        tiles = side_by_side(rows, cols, (side, side), size)
        return Tiling((*tiles, whole), (rows, cols))


@architecture
class SmolVLM(Idefics3):
    """SmolVLM, which reads each frame of a video as one tile; its processor names both kinds of pixels alike."""

    model_types = ("smolvlm",)
    mixes = False

    def moments(
        self, processor: Any, inputs: Any, index: int, frames: int, size: tuple[int, int]
    ) -> list[tuple[range, Tiling]]:
        side = math.isqrt(processor.image_seq_len)
        return whole_frames(frames, side, side, size)


def _splits(images: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Return into how many rows and columns of tiles the processor cuts an image."""
    if not images.do_image_splitting:
        return 1, 1
    width, height = size
    if images.do_resize:
        resize = sys.modules[type(images).__module__].get_resize_output_image_size  # type: ignore[attr-defined]
        empty = np.broadcast_to(np.uint8(0), (3, height, width))
        height, width = resize(empty, resolution_max_side=images.size["longest_edge"])
    edge, ratio = images.max_image_size["longest_edge"], width / height
    if width >= height:  # as the processor rounds: the longer side first
        cols = math.ceil(width / edge)
        return math.ceil(int(cols * edge / ratio) / edge), cols
    rows = math.ceil(height / edge)
    return rows, math.ceil(int(rows * edge * ratio) / edge)
