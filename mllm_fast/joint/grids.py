"""Resampling between two token grids over one image, from the detector's grid to the language model's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import InputError
from ..core.layout import Tile


def same(left: Tile, right: Tile) -> bool:
    """Return whether two grids have the same tokens over the same pixels."""
    close = all(abs(a - b) < 1e-3 for a, b in zip(left.box, right.box, strict=True))
    return (left.rows, left.cols) == (right.rows, right.cols) and close


def resample(tokens: Tensor, given: Tile, wanted: Tile) -> Tensor:
    """Resample tokens from one grid to another, with bilinear interpolation between the centres of the tokens.

    If the wanted grid is coarser, each of its tokens is a mean over its area, sampled at as many points as the finer
    grid has there. Points outside the given grid take the nearest token. Gradients flow through the result. If both
    grids are the same, the tokens are returned unchanged.

    Args:
        tokens: Tokens of the given grid, [rows * cols, d].
        given: The grid of the tokens.
        wanted: The grid to resample to.

    Returns:
        Tokens of the wanted grid, [n, d].
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
    """Return the only grid of an image.

    Raises:
        InputError: If the language model's processor cut the image into several tiles.
    """
    if len(tiles) != 1:
        raise InputError(
            f"the language model's processor cuts this image into {len(tiles)} tiles, a joint model needs one grid a"
            " image; set crop_to_patches=False in the processor's images_kwargs"
        )
    return tiles[0]


def note(given: Tile, wanted: Tile) -> str:
    """Say in words what `resample` does; empty if it does nothing."""
    if same(given, wanted):
        return ""
    return (
        f"the detector's {given.rows} x {given.cols} tokens were resampled to the language model's"
        f" {wanted.rows} x {wanted.cols}"
    )
