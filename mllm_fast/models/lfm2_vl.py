"""LFM2-VL: one tile in the image's own shape, or square tiles with a thumbnail last."""

from __future__ import annotations

import math
from typing import Any

from ..core.errors import InputError
from ..core.layout import Tile, Tiling, side_by_side
from .adapter import Adapter
from .architectures import architecture


@architecture
class Lfm2VL(Adapter):
    """LFM2-VL, whose processor gives the patches of every view."""

    model_types = ("lfm2_vl",)

    def tiles(self, processor: Any, inputs: Any, index: int, size: tuple[int, int]) -> Tiling:
        images, (width, height) = processor.image_processor, size
        merge = images.downsample_factor
        views = [
            (math.ceil(int(rows) / merge), math.ceil(int(cols) / merge)) for rows, cols in inputs["spatial_shapes"]
        ]
        whole = (0.0, 0.0, float(width), float(height))
        if len(views) == 1:
            return Tiling((Tile(views[0][0], views[0][1], whole),))
        if not images.do_image_splitting:
            return Tiling((Tile(views[index][0], views[index][1], whole),))
        layout = images._get_grid_layout(height, width, images.min_tiles, images.max_tiles, images.tile_size)
        cols, rows = layout[:2]
        count = rows * cols
        if len(views) not in (count, count + 1):
            raise InputError(
                f"the image has {count} tiles, the batch {len(views)} views, so it is not known which are whose: give"
                " one image at a time"
            )
        tiles = side_by_side(rows, cols, views[0], size)
        thumbnail = [Tile(view[0], view[1], whole) for view in views[count:]]
        return Tiling((*tiles, *thumbnail), (rows, cols))
