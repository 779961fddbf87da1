"""PaliGemma and Gemma: one square per image, crops of it, or a grid of pooled patches."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..core.layout import Tile, Tiling
from .adapter import Adapter
from .architectures import architecture


@architecture
class PaliGemma(Adapter):
    """PaliGemma: each image is resized to a square."""

    model_types = ("paligemma",)

    def tiles(self, processor: Any, inputs: Any, index: int, size: tuple[int, int]) -> Tiling:
        side = math.isqrt(processor.image_seq_length)
        return Tiling((Tile(side, side, (0.0, 0.0, float(size[0]), float(size[1]))),))


@architecture
class Gemma3(Adapter):
    """Gemma 3: a square of the whole image, followed by squares of its crops if pan and scan is on."""

    model_types = ("gemma3",)

    def tiles(self, processor: Any, inputs: Any, index: int, size: tuple[int, int]) -> Tiling:
        side, (width, height) = math.isqrt(processor.image_seq_length), size
        whole = Tile(side, side, (0.0, 0.0, float(width), float(height)))
        images = processor.image_processor
        if not images.do_pan_and_scan:
            return Tiling((whole,))
        names = ("min_crop_size", "max_num_crops", "min_ratio_to_activate")
        settings = {f"pan_and_scan_{name}": getattr(images, f"pan_and_scan_{name}") for name in names}
        # the processor's own crops, of an image without memory
        crops = images.pan_and_scan(np.broadcast_to(np.uint8(0), (3, height, width)), **settings)
        if not crops:
            return Tiling((whole,))
        tall, wide = crops[0].shape[1:]
        boxes = [
            (float(left), float(top), float(min(left + wide, width)), float(min(top + tall, height)))
            for top in range(0, height, tall)
            for left in range(0, width, wide)
        ]
        canvas = (math.ceil(height / tall), math.ceil(width / wide))
        return Tiling((whole, *(Tile(side, side, box) for box in boxes)), canvas, first=1)


@architecture
class Gemma4(Adapter):
    """Gemma 4: a grid in the shape of the image, whose patches are pooled."""

    model_types = ("gemma4",)

    def tiles(self, processor: Any, inputs: Any, index: int, size: tuple[int, int]) -> Tiling:
        pool = processor.image_processor.pooling_kernel_size
        places = inputs["image_position_ids"][index]  # (column, row) of each patch, negative for padding
        cols, rows = (int(n) // pool for n in places[places[:, 0] >= 0].max(0).values + 1)
        return Tiling((Tile(rows, cols, (0.0, 0.0, float(size[0]), float(size[1]))),))
