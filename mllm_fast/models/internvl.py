"""InternVL: tiles of a canvas that fits the shape of the image, followed by a thumbnail of the whole image."""

from __future__ import annotations

import math
import sys
from typing import Any

from ..core.layout import Tile
from .adapter import Adapter, Tiling
from .architectures import architecture


@architecture
class InternVL(Adapter):
    """InternVL as implemented in transformers, with a Qwen2 or LLaMA language model."""

    model_type = "internvl"
    text_types = ("qwen2", "llama")
    fixed_grid = True

    def tiles(self, processor: Any, inputs: Any, index: int, size: tuple[int, int]) -> Tiling:
        side = math.isqrt(processor.image_seq_length)
        width, height = size
        images = processor.image_processor
        crop = _internvl_defaults(processor).get("crop_to_patches", images.crop_to_patches)
        whole = (0.0, 0.0, float(width), float(height))
        if not crop or images.max_patches <= 1:
            return (Tile(side, side, whole),), (1, 1)
        # the function by which the processor itself chooses the canvas
        choose = sys.modules[type(images).__module__].get_optimal_tiled_canvas  # type: ignore[attr-defined]
        tile_size = (images.size["height"], images.size["width"])
        cols, rows = choose((height, width), tile_size, images.min_patches, images.max_patches)
        tiles = [
            Tile(side, side, (c * width / cols, r * height / rows, (c + 1) * width / cols, (r + 1) * height / rows))
            for r in range(rows)
            for c in range(cols)
        ]
        if len(tiles) > 1:
            tiles.append(Tile(side, side, whole))  # the thumbnail
        return tuple(tiles), (rows, cols)


def _internvl_defaults(processor: Any) -> dict[str, Any]:
    """Return the processor's default arguments for its image processor; older releases keep them elsewhere."""
    found = getattr(processor, "images_kwargs", None)
    if found is None:
        from transformers.models.internvl import processing_internvl

        found = processing_internvl.InternVLProcessorKwargs._defaults["images_kwargs"]
    return found
