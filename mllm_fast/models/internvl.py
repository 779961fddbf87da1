"""InternVL and its relatives: tiles of a canvas that fits the shape of the image, and a view of the whole image."""

from __future__ import annotations

import math
import sys
from importlib import import_module
from typing import Any

from ..core.layout import Tile, Tiling, side_by_side
from .adapter import Adapter, whole_frames
from .architectures import architecture


class Canvas(Adapter):
    """Tiles side by side, with a view of the whole image before or after them if there are several."""

    whole_first = False

    def side(self, processor: Any) -> int:
        """Return how many tokens lie along a side of a tile."""
        raise NotImplementedError

    def crops(self, processor: Any) -> bool:
        """Return whether the processor makes tiles."""
        return processor.image_processor.crop_to_patches

    def canvas(self, images: Any, size: tuple[int, int]) -> tuple[int, int]:
        """Return the columns and rows of the canvas, by the function by which the processor itself chooses them."""
        choose = sys.modules[type(images).__module__].get_optimal_tiled_canvas  # type: ignore[attr-defined]
        tile = (images.size["height"], images.size["width"])
        return choose((size[1], size[0]), tile, images.min_patches, images.max_patches)

    def tiles(self, processor: Any, inputs: Any, index: int, size: tuple[int, int]) -> Tiling:
        side, images, (width, height) = self.side(processor), processor.image_processor, size
        whole = Tile(side, side, (0.0, 0.0, float(width), float(height)))
        if not self.crops(processor) or images.max_patches <= 1:
            return Tiling((whole,))
        cols, rows = (int(n) for n in self.canvas(images, size))
        tiles = side_by_side(rows, cols, (side, side), size)
        if len(tiles) == 1:
            return Tiling(tiles)
        if self.whole_first:
            return Tiling((whole, *tiles), (rows, cols), first=1)
        return Tiling((*tiles, whole), (rows, cols))


@architecture
class InternVL(Canvas):
    """InternVL as implemented in transformers."""

    model_types = ("internvl",)
    fixed_grid = True

    def side(self, processor: Any) -> int:
        return math.isqrt(processor.image_seq_length)

    def crops(self, processor: Any) -> bool:
        return _crops(processor, "internvl", "InternVLProcessorKwargs")

    def moments(
        self, processor: Any, inputs: Any, index: int, frames: int, size: tuple[int, int]
    ) -> list[tuple[range, Tiling]]:
        side = self.side(processor)
        return whole_frames(frames, side, side, size)


@architecture
class AyaVision(Canvas):
    """Aya Vision, whose tiles have a mark before each of them."""

    model_types = ("aya_vision",)

    def side(self, processor: Any) -> int:
        return processor.img_size // processor.patch_size

    def crops(self, processor: Any) -> bool:
        return _crops(processor, "aya_vision", "AyaVisionProcessorKwargs")


@architecture
class Cohere2Vision(Canvas):
    """Command A Vision, whose tiles have a line break behind each of them."""

    model_types = ("cohere2_vision",)

    def side(self, processor: Any) -> int:
        return int(processor.patch_size)


@architecture
class Ovis2(Canvas):
    """Ovis2: the whole image first, then the fewest tiles that cover most of it."""

    model_types = ("ovis2",)
    whole_first = True

    def side(self, processor: Any) -> int:
        return math.isqrt(processor.image_seq_length)

    def canvas(self, images: Any, size: tuple[int, int]) -> tuple[int, int]:
        if not images.use_covering_area_grid:
            return super().canvas(images, size)
        choose = sys.modules[type(images).__module__].get_min_tile_covering_grid  # type: ignore[attr-defined]
        return choose((size[1], size[0]), images.size["height"], images.max_patches)


def _crops(processor: Any, package: str, name: str) -> bool:
    """Return whether a processor tells its image processor to make tiles; older releases keep that elsewhere."""
    found = getattr(processor, "images_kwargs", None)
    if found is None:
        module = import_module(f"transformers.models.{package}.processing_{package}")
        found = getattr(module, name)._defaults.get("images_kwargs", {})
    return found.get("crop_to_patches", processor.image_processor.crop_to_patches)
