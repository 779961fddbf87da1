"""Gradient alignment (arXiv 2405.14612): weights of a detector's boxes, for explanations by a joint model."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...core.layout import ImageLayout, overlaps
from ..box_weights import BoxWeights
from ..registry import Heads, heatmap_method
from ..scores import Scores

_SIDE = 1024  # most pixels of the longer side of the canvas that boxes are painted on


@heatmap_method(
    "gradient-alignment",
    "largest weight among the detector's boxes over a pixel (gradient alignment)",
    needs_detector=True,
    takes_heads=False,
)
def attribution(scores: Scores, token: int, image: ImageLayout, heads: Heads) -> Tensor:
    """Return the mean saliency of each image token's pixels, 0 to 1, float32 [n].

    A pixel's saliency is the largest weight among the boxes that cover it.
    """
    number = next(i for i, one in enumerate(scores.layout.images) if one is image)
    return token_means(scores.box_weights(token, image=number), image)


def token_means(found: BoxWeights, image: ImageLayout) -> Tensor:
    """Return the mean saliency of each image token's pixels, float32 [n]."""
    scale = min(1.0, _SIDE / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    pixels = found.pixels((width, height)).numpy()
    values = []
    for tile in image.known_tiles:
        left, top, right, bottom = tile.box
        down = overlaps(np.linspace(top, bottom, tile.rows + 1), np.linspace(0, image.size[1], height + 1))
        across = overlaps(np.linspace(left, right, tile.cols + 1), np.linspace(0, image.size[0], width + 1))
        area = down.sum(1)[:, None] * across.sum(1)[None]
        values.append((down @ pixels @ across.T / np.maximum(area, 1e-9)).reshape(-1))
    return torch.from_numpy(np.concatenate(values)).float()
