"""A figure of what a context keeps: one small image per layer, in which dropped patches are dark."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from ..core.files import check_target, whole_file
from ..core.layout import TokenLayout
from ..core.moments import time_label
from ..core.png_notes import png_notes
from ..drawing.heatmap import upsample
from ..drawing.text import FAINT, INK, MARGIN, PAPER, Text, put_text
from ..models.provenance import made_with, now

ENDINGS = (".png",)
_SIDE = 200


class Drawable(Protocol):
    """What a figure reads of a `Context`."""

    @property
    def vlm(self) -> Any: ...
    @property
    def positions(self) -> torch.Tensor: ...
    @property
    def layout(self) -> TokenLayout: ...
    @property
    def prompt(self) -> str: ...
    @property
    def settings(self) -> dict[str, Any]: ...
    @property
    def canvases(self) -> list[Any]: ...


def save_kept(ctx: Drawable, path: str | os.PathLike[str]) -> None:
    """Write the image of `draw_kept` to a .png file, which appears whole or not at all."""
    target = Path(path)
    check_target(target, ENDINGS)
    drawn = draw_kept(ctx)
    about = {"prompt": ctx.prompt, "settings": ctx.settings}
    made = {**made_with(ctx.vlm.model), "date": now(), **about}
    with whole_file(target) as name:
        drawn.save(name, "PNG", pnginfo=png_notes(made))


def draw_kept(ctx: Drawable) -> Image.Image:
    """Draw the image tokens that a context keeps.

    Each layer has one cell, with the kept patches of the images lit. The last cell shows how often each patch is kept.
    Of a video each moment has one cell instead, of all layers together.
    """
    layers = len(ctx.positions)
    if ctx.layout.videos:
        entries = []
        for i, image in enumerate(ctx.layout.images):
            kept = torch.isin(ctx.positions, image.positions).sum().item() / layers
            label = f"image {i}" if image.moment is None else time_label(image.moment)
            entries.append((f"{label}: {kept:.1f} of {len(image.positions)}", _lit(ctx, range(layers), [i])))
    else:
        entries = [(f"layer {i}", _lit(ctx, [i])) for i in range(layers)]
        entries.append((f"all {layers} layers together", _lit(ctx, range(layers))))
    across = min(len(entries), max(3, math.ceil(math.sqrt(1.6 * len(entries)))))
    rows = math.ceil(len(entries) / across)
    width = across * (_SIDE + MARGIN) + MARGIN
    tall = max(cell.height for _, cell in entries) + 36
    text = Text(width - 2 * MARGIN)
    count = len(ctx.layout.positions("image"))
    what = "tokens of all moments" if ctx.layout.videos else "image tokens"
    total = ctx.settings["kept"]
    head = text.wrap(f"Kept: {total} of {count} {what} a layer, score \u201c{ctx.settings['score']}\u201d", 18, INK)
    head += text.wrap(f"Prompt: {ctx.prompt}", 14, FAINT)
    foot = text.wrap(
        "Lit: patches whose token the layer keeps. Together: the more layers keep it, the brighter.", 14, FAINT
    )
    above = sum(line.height for line in head) + 2 * MARGIN
    sheet = Image.new("RGB", (width, above + rows * tall + sum(line.height for line in foot) + MARGIN), PAPER)
    text.put(sheet, head, MARGIN)
    for n, (label, cell) in enumerate(entries):
        x, y = MARGIN + n % across * (_SIDE + MARGIN), above + n // across * tall
        sheet.paste(cell, (x, y))
        put_text(sheet, (x, y + cell.height + 4), label, 16, INK)
    text.put(sheet, foot, above + rows * tall)
    return sheet


def _lit(ctx: Drawable, layers: Sequence[int], images: Sequence[int] | None = None) -> Image.Image:
    """Draw images (all by default) below each other, each patch as bright as the share of these layers that keep it."""
    cells = []
    for i in range(len(ctx.layout.images)) if images is None else images:
        picture, where = ctx.canvases[i], ctx.layout.images[i]
        scale = _SIDE / max(picture.size)
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        smooth = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
        base = np.asarray(picture.resize(size, smooth), dtype=np.float64)
        share = np.zeros(where.grid)
        for layer in layers:
            share += _cells(ctx, layer, i)
        box = [edge * size[n % 2] / where.size[n % 2] for n, edge in enumerate(where.box)]
        light, _ = upsample(share / len(layers), (box[0], box[1], box[2], box[3]), size)
        shade = 0.18 + 0.82 * light[..., None]
        cells.append(Image.fromarray(np.rint(base * shade).astype(np.uint8)))
    whole = Image.new("RGB", (_SIDE, sum(cell.height + 4 for cell in cells) - 4), PAPER)
    y = 0
    for cell in cells:
        whole.paste(cell, (0, y))
        y += cell.height + 4
    return whole


def _cells(ctx: Drawable, layer: int, image: int) -> np.ndarray:
    """Return 1 for the cells of an image's grid that a layer keeps, and 0 for the others.

    A kept token of a thumbnail sets all cells that it covers.
    """
    where = ctx.layout.images[image]
    kept = torch.isin(where.positions, ctx.positions[layer])
    return (where.to_grid(kept.double()) > 0).double().numpy()
