"""Two grids over one image: the detector's tokens read where the language model's tokens lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import InputError
from ..core.layout import Tile


def same(left: Tile, right: Tile) -> bool:
    """Do two grids have the same tokens over the same pixels?"""
    close = all(abs(a - b) < 1e-3 for a, b in zip(left.box, right.box, strict=True))
    return (left.rows, left.cols) == (right.rows, right.cols) and close


def resample(tokens: Tensor, given: Tile, wanted: Tile) -> Tensor:
    """Tokens [rows * cols, d] of one grid, between their middles bilinear, at the middles of another's: [n, d].

    A coarser grid takes the mean over its token's area, by as many points as the finer has there. What lies outside of
    the given grid takes its nearest token. Gradients flow through it; the same grid gives the same tokens.
    """
    if same(given, wanted):
        return tokens
    left, top, right, bottom = given.box
    x0, y0, x1, y1 = wanted.box
    per_row = max(1, round((y1 - y0) / wanted.rows / ((bottom - top) / given.rows)))
    per_col = max(1, round((x1 - x0) / wanted.cols / ((right - left) / given.cols)))
    rows, cols = wanted.rows * per_row, wanted.cols * per_col
    y = y0 + (y1 - y0) * (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    x = x0 + (x1 - x0) * (torch.arange(cols, dtype=torch.float64) + 0.5) / cols
    # grid_sample counts from -1 at the first edge to 1 at the last
    y, x = 2 * (y - top) / (bottom - top) - 1, 2 * (x - left) / (right - left) - 1
    points = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1).to(tokens)
    image = tokens.reshape(given.rows, given.cols, -1).permute(2, 0, 1)
    found = F.grid_sample(image[None], points[None], "bilinear", "border", align_corners=False)[0]
    found = found.unflatten(2, (wanted.cols, per_col)).unflatten(1, (wanted.rows, per_row)).mean((2, 4))
    return found.permute(1, 2, 0).reshape(-1, tokens.shape[-1])


def single_tile(tiles: Sequence[Tile]) -> Tile:
    """The one grid of an image.

    Raises:
        InputError: the language model's processor cut the image into several.
    """
    if len(tiles) != 1:
        raise InputError(
            f"the language model's processor cuts this image into {len(tiles)} tiles, a joint model needs one grid a"
            " image; set crop_to_patches=False in the processor's images_kwargs"
        )
    return tiles[0]


def note(given: Tile, wanted: Tile) -> str:
    """What was done, in words; empty where nothing was."""
    if same(given, wanted):
        return ""
    return (
        f"the detector's {given.rows} x {given.cols} tokens were resampled to the language model's"
        f" {wanted.rows} x {wanted.cols}"
    )
