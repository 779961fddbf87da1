"""Drawing of a heatmap over an image, and of the colour bar beside it."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from ..core.layout import Box, overlaps
from .text import FAINT, INK, font

# dark to light in even steps of lightness, so that it reads without colour vision and in print
_STOPS = ((12, 8, 38), (72, 16, 104), (148, 38, 104), (216, 78, 66), (248, 150, 38), (252, 232, 140))


def colors(values: np.ndarray) -> np.ndarray:
    """Return the colours of values in 0 .. 1, [...], as float64 [..., 3] in 0 .. 255."""
    at = np.linspace(0, 1, len(_STOPS))
    channels = [np.interp(values, at, [stop[c] for stop in _STOPS]) for c in range(3)]
    return np.stack(channels, -1)


def upsample(grid: np.ndarray, box: Box, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Lay a grid of cells over a box of an image, true to area.

    A pixel takes the mean of the cells that it overlaps, weighted by the area of each overlap.

    Args:
        grid: The values of the cells, [rows, cols].
        box: The part of the image that the grid covers.
        size: (width, height) of the image.

    Returns:
        The map [H, W], 0 outside the box, and the share of each pixel that lies inside the box [H, W].
    """
    width, height = size
    rows, cols = grid.shape
    left, top, right, bottom = box
    down = overlaps(np.arange(height + 1.0), np.linspace(top, bottom, rows + 1))
    across = overlaps(np.arange(width + 1.0), np.linspace(left, right, cols + 1))
    covered = down.sum(1)[:, None] * across.sum(1)[None, :]
    total = down @ grid @ across.T
    return np.divide(total, covered, out=np.zeros_like(total), where=covered > 0), covered


def overlay(picture: Image.Image, grid: np.ndarray, box: Box, top: float, side: int, faded: bool = True) -> Image.Image:
    """Return the image with a grid's positive values drawn over it as a heatmap.

    Args:
        picture: The image.
        grid: The values of the cells, [rows, cols].
        box: The part of the image that the grid covers.
        top: The value that is drawn at full strength.
        side: The longer side of the result, in pixels.
        faded: Fade the colours of the image, so that the heatmap stands out.
    """
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    smooth = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    base = np.asarray(picture.resize(size, smooth), dtype=np.float64)
    x, y = size[0] / picture.width, size[1] / picture.height
    scaled_box = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
    heat, _ = upsample(np.clip(grid, 0, None), scaled_box, size)
    heat = np.clip(heat / top, 0, 1) if top > 0 else np.zeros_like(heat)
    if faded:  # so that the heatmap stands out
        base = 0.8 * (0.5 * base + 0.5 * base.mean(-1, keepdims=True))
    strength = 0.85 * np.sqrt(heat)[..., None]
    return Image.fromarray(np.rint(base * (1 - strength) + colors(heat) * strength).astype(np.uint8))


def color_bar(sheet: Image.Image, draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], top: float) -> None:
    """Draw the colour bar from 0 to `top` into `box`, with its numbers."""
    left, upper, right, lower = box
    ramp = colors(np.linspace(1, 0, lower - upper))[:, None].repeat(right - left, 1)
    sheet.paste(Image.fromarray(np.rint(ramp).astype(np.uint8)), (left, upper))
    draw.rectangle((left, upper, right - 1, lower - 1), outline=FAINT)
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = lower - 1 - share * (lower - 1 - upper)
        draw.line((right, y, right + 4, y), fill=FAINT)
        draw.text((right + 8, y), f"{share * top:.2f}", font=font(14), fill=INK, anchor="lm")
