"""PerceptionLM: a thumbnail first, then square tiles, row by row."""

from __future__ import annotations

from typing import Any

from ..core.layout import Tile, Tiling, side_by_side
from .adapter import Adapter
from .architectures import architecture


@architecture
class PerceptionLM(Adapter):
    """PerceptionLM, whose processor stretches the image over the canvas of tiles that fits it best."""

    model_types = ("perception_lm",)

    def tiles(self, processor: Any, inputs: Any, index: int, size: tuple[int, int]) -> Tiling:
        images, (width, height) = processor.image_processor, size
        side = images.tile_size // processor.patch_size // processor.pooling_ratio
        whole = Tile(side, side, (0.0, 0.0, float(width), float(height)))
        if images.vision_input_type != "thumb+tile":
            return Tiling((whole,))
        cols, rows = 1, 1
        if images.max_num_tiles > 1:
            given = {"img_width": width, "img_height": height, "tile_size": images.tile_size}
            cols, rows = images._fit_image_to_canvas(**given) or images._find_closest_aspect_ratio(**given)
        return Tiling((whole, *side_by_side(rows, cols, (side, side), size)), (rows, cols), first=1)
