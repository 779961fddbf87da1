"""LLaVA-NeXT and its relatives: a view of the whole image, then a finer one in its own shape with row ends."""

from __future__ import annotations

import math
from typing import Any

from transformers.image_processing_utils import select_best_resolution

from ..core.layout import Tile, Tiling
from .adapter import Adapter, whole_frames
from .architectures import architecture
from .llava import cropped_box


@architecture
class LlavaNext(Adapter):
    """LLaVA-NeXT."""

    model_types: tuple[str, ...] = ("llava_next",)

    def side(self, processor: Any, pixels: int) -> int:
        """Return how many tokens lie along a side of a view that is `pixels` wide."""
        return pixels // processor.patch_size

    def fine_rows(self, processor: Any, rows: int, cols: int, side: int) -> tuple[int, int]:
        """Return the rows and columns of the finer view, from those that its patches make."""
        return rows, cols

    def tiles(self, processor: Any, inputs: Any, index: int, size: tuple[int, int]) -> Tiling:
        width, height = size
        pixels = int(inputs["pixel_values"].shape[-1])
        side = self.side(processor, pixels)
        whole = Tile(side, side, (0.0, 0.0, float(width), float(height)))
        target = select_best_resolution((height, width), processor.image_processor.image_grid_pinpoints)
        across = _kept(width, height, target[1], target[0], side * (target[1] // pixels), pixels // side)
        down = _kept(height, width, target[0], target[1], side * (target[0] // pixels), pixels // side)
        rows, cols = self.fine_rows(processor, down[2], across[2], side)
        box = (across[0], down[0], across[1], down[1])
        return Tiling((whole, Tile(rows, cols, box, row_ends=True)), first=1)


@architecture
class LlavaNextVideo(LlavaNext):
    """LLaVA-NeXT-Video: frames are cut to a square, and two by two tokens are pooled."""

    model_types = ("llava_next_video",)

    def moments(
        self, processor: Any, inputs: Any, index: int, frames: int, size: tuple[int, int]
    ) -> list[tuple[range, Tiling]]:
        height, width = inputs["pixel_values_videos"].shape[-2:]
        cell = 2 * processor.patch_size
        tile = Tile(height // cell, width // cell, cropped_box(processor.video_processor, size, (width, height)))
        return [(range(i, i + 1), Tiling((tile,))) for i in range(frames)]


@architecture
class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision, which makes the finer view smaller if it has more than a number of views' tokens."""

    model_types = ("llava_onevision",)

    def side(self, processor: Any, pixels: int) -> int:
        return math.isqrt(processor.num_image_tokens)

    def fine_rows(self, processor: Any, rows: int, cols: int, side: int) -> tuple[int, int]:
        most = int(processor.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * cols / (most * side**2))
        return (int(rows // ratio), int(cols // ratio)) if ratio > 1.1 else (rows, cols)

    def tiles(self, processor: Any, inputs: Any, index: int, size: tuple[int, int]) -> Tiling:
        several = inputs.get("batch_num_images")
        if several is None or int(several.max()) == 1:
            return super().tiles(processor, inputs, index, size)
        # each of several images has its whole view alone, with one row end behind all rows
        side, box = self.side(processor, 0), (0.0, 0.0, float(size[0]), float(size[1]))
        return Tiling((Tile(side, side, box), Tile(1, 0, box, row_ends=True)))

    def moments(
        self, processor: Any, inputs: Any, index: int, frames: int, size: tuple[int, int]
    ) -> list[tuple[range, Tiling]]:
        side = math.ceil(self.side(processor, 0) / 2)
        found = whole_frames(frames, side, side, size)
        where, last = found[-1]
        # one row end closes the video
        found[-1] = where, Tiling((*last.tiles, Tile(1, 0, last.tiles[0].box, row_ends=True)))
        return found


def _kept(length: int, other: int, target: int, other_target: int, cells: int, patch: int) -> tuple[float, float, int]:
    """Return what a side of the finer view keeps: its first and last pixel in the original image, and its cells.

    The image is resized to fit the target and padded to it. Cells that lie in the padding alone are cut off.

    Args:
        length, other: This side of the original image in pixels, and the other side.
        target, other_target: The sides of the target in pixels.
        cells: How many cells this side of the target has.
        patch: The size of a cell in pixels of the target.
    """
    resized, before, cut = target, 0, 0
    if target * other > other_target * length:  # the other side fits exactly, this one is padded
        resized = min(math.ceil(length * (other_target / other)), target)
        before = (target - resized) // 2
        other_cells = cells * other_target // target
        cut = (cells - int(round(length * (other_cells / other), 7))) // 2
    scale = length / resized
    return (cut * patch - before) * scale, ((cells - cut) * patch - before) * scale, cells - 2 * cut
