"""Drawings of an explanation: a heat map over the picture, a colour bar, the words it belongs to."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from ..core.layout import Box, overlaps
from ..drawing.boxes import Labelled, put_boxes
from ..drawing.text import FAINT, INK, MARGIN, PAPER, Text, font, shorten
from .explanation import Explanation, Heads
from .registry import ALIGNMENT, MEANINGS

# dark to light in even steps of lightness, so that it reads without colour vision and in print
_STOPS = ((12, 8, 38), (72, 16, 104), (148, 38, 104), (216, 78, 66), (248, 150, 38), (252, 232, 140))


def colors(values: np.ndarray) -> np.ndarray:
    """Colours of values in 0 .. 1: [...] -> float64 [..., 3] in 0 .. 255."""
    at = np.linspace(0, 1, len(_STOPS))
    channels = [np.interp(values, at, [stop[c] for stop in _STOPS]) for c in range(3)]
    return np.stack(channels, -1)


def upsample(grid: np.ndarray, box: Box, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Lay a grid of cells over `box` of a picture of `size` (width, height), true to area.

    A pixel takes the mean of the cells it lies in, weighted by how much of it each covers. Returns the map
    [H, W] and the share of each pixel inside the box [H, W]; outside the map is 0.
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
    """The picture, its longer side `side` pixels, with the grid's positive values over it; `top` is full heat."""
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    smooth = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    base = np.asarray(picture.resize(size, smooth), dtype=np.float64)
    x, y = size[0] / picture.width, size[1] / picture.height
    scaled_box = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
    heat, _ = upsample(np.clip(grid, 0, None), scaled_box, size)
    heat = np.clip(heat / top, 0, 1) if top > 0 else np.zeros_like(heat)
    if faded:  # so that the heat is what stands out
        base = 0.8 * (0.5 * base + 0.5 * base.mean(-1, keepdims=True))
    strength = 0.85 * np.sqrt(heat)[..., None]
    return Image.fromarray(np.rint(base * (1 - strength) + colors(heat) * strength).astype(np.uint8))


def draw_token(ex: Explanation, token: int, heads: int = 10, method: str = "logprob") -> Image.Image:
    """One token: each picture and its map side by side, the colour bar, the question, the answer; of gradient alignment
    the five boxes of largest weight as well."""
    maps = [token_map(ex, token, method, heads, i) for i in range(len(ex.images))]
    top = max(float(grid.max()) for grid, _, _ in maps)
    side = 420
    pairs = []
    for picture, (grid, box, boxes), layout in zip(ex.images, maps, ex.layout.images, strict=True):
        heated = overlay(picture, grid, box, top, side)
        put_boxes(heated, boxes, side / max(picture.size))
        pairs.append((overlay(picture, np.zeros((1, 1)), layout.box, 0, side, faded=False), heated))
    bar = 90
    width = max(2 * pair[0].width for pair in pairs) + 3 * MARGIN + bar
    width = max(width, 640)
    text = Text(width - 2 * MARGIN)
    lines = [
        *text.wrap(f"Question: {ex.prompt}", 18, INK),
        *text.wrap(f"Answer: {ex.text}", 18, INK),
        *text.wrap(
            f"Explained token: \u201c{ex.tokens[token].strip()}\u201d ({token + 1} of {len(ex.tokens)})", 22, INK
        ),
    ]
    note = _note(ex, method, heads)
    lowest = min(float(grid.min()) for grid, _, _ in maps)
    if lowest < 0:
        note += f" Negative parts (down to {lowest:.3g}) are not drawn."
    if method == ALIGNMENT:
        found = ex.box_weights(token)
        note += f" The detector looks for \u201c{found.query}\u201d; drawn are the five boxes of largest weight."
        note += f" Note: {found.note}." if found.note else ""
    foot = text.wrap(note, 14, FAINT)
    check = ex.verified(token, method, heads)
    if check is not None:
        foot += text.wrap(f"Check: {check}.", 14, INK)
    head_height = sum(line.height for line in lines) + 2 * MARGIN
    foot_height = sum(line.height for line in foot) + MARGIN
    body = sum(pair[0].height + MARGIN for pair in pairs)
    sheet = Image.new("RGB", (width, head_height + body + foot_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    y = text.put(draw, lines, MARGIN)
    y = head_height
    for original, heated in pairs:
        sheet.paste(original, (MARGIN, y))
        sheet.paste(heated, (2 * MARGIN + original.width, y))
        y += original.height + MARGIN
    right = 3 * MARGIN + 2 * pairs[0][0].width
    _color_bar(sheet, draw, (right, head_height, right + 20, head_height + pairs[0][0].height), top)
    text.put(draw, foot, head_height + body)
    return sheet


def draw_sheet(ex: Explanation, heads: int = 10, method: str = "logprob") -> Image.Image:
    """All tokens: a map each, all on one scale, so that a word that no patch raised stays bare."""
    side = 200
    layouts = ex.layout.images
    maps = [
        [token_map(ex, token, method, heads, i)[:2] for i in range(len(layouts))] for token in range(len(ex.tokens))
    ]
    top = max(float(grid.max()) for grids in maps for grid, _ in grids)
    entries = [(overlay(p, np.zeros((1, 1)), (0, 0, 1, 1), 0, side, faded=False), "the picture", "") for p in ex.images]
    for index, (token, grids) in enumerate(zip(ex.tokens, maps, strict=True)):
        check = ex.verified(index, method, heads)
        found = "" if check is None else f", check: {check.verdict}"
        for picture, (grid, box) in zip(ex.images, grids, strict=True):
            drawn = overlay(picture, grid, box, top, side)
            entries.append((drawn, f"\u201c{token.strip()}\u201d", f"up to {float(grid.max()):.2f}{found}"))
    across = min(len(entries), max(3, math.ceil(math.sqrt(len(entries) * 1.6))))
    bar = 80
    width = across * (side + MARGIN) + MARGIN + bar
    tall = max(entry[0].height for entry in entries) + 58
    text = Text(width - 2 * MARGIN)
    lines = [*text.wrap(f"Question: {ex.prompt}", 18, INK), *text.wrap(f"Answer: {ex.text}", 18, INK)]
    foot = text.wrap(_note(ex, method, heads), 14, FAINT)
    if any(ex.verified(token, method, heads) for token in range(len(ex.tokens))):
        foot += text.wrap(
            "Check: the highest patches are knocked out; \u201cholds\u201d if log p(token) falls more than without"
            " random or the lowest patches, \u201cfails\u201d if not, \u201copen\u201d if no set of patches moves it.",
            14,
            FAINT,
        )
    head_height = sum(line.height for line in lines) + 2 * MARGIN
    rows = math.ceil(len(entries) / across)
    height = head_height + rows * tall + sum(line.height for line in foot) + MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    text.put(draw, lines, MARGIN)
    for n, (cell, label, most) in enumerate(entries):
        x = MARGIN + (n % across) * (side + MARGIN)
        y = head_height + (n // across) * tall
        sheet.paste(cell, (x, y))
        draw.text((x, y + cell.height + 4), shorten(label, font(18), side), font=font(18), fill=INK)
        draw.text((x, y + cell.height + 27), most, font=font(14), fill=FAINT)
    right = MARGIN + across * (side + MARGIN)
    _color_bar(sheet, draw, (right, head_height, right + 20, head_height + entries[0][0].height), top)
    text.put(draw, foot, head_height + rows * tall)
    return sheet


def token_map(
    ex: Explanation, token: int, method: str, heads: Heads, image: int = 0
) -> tuple[np.ndarray, Box, list[Labelled]]:
    """A token's map of one picture, the part of the picture it lies over, and boxes to draw."""
    if method != ALIGNMENT:
        return ex.heatmap(token, method, heads, image).double().numpy(), ex.layout.images[image].box, []
    found = ex.box_weights(token, image=image)
    width, height = found.size
    scale = min(1.0, 512 / max(found.size))
    pixels = found.pixels((max(1, round(width * scale)), max(1, round(height * scale))))
    boxes = [Labelled(box, f"{weight:.2f}") for weight, _, box in reversed(found.best(5))]
    return pixels.double().numpy(), (0.0, 0.0, float(width), float(height)), boxes


def _note(ex: Explanation, method: str, heads: int) -> str:
    """What the colours mean."""
    meaning = MEANINGS[method]
    if method == "logprob":
        meaning = meaning.replace("the best", f"the {min(heads, ex.num_layers * ex.num_heads)} best")
        meaning += f" ({ex.norm} norm)"
    if method == ALIGNMENT:
        meaning += ", of each word 0 to 1"
    return f"Colour: {meaning}."


def _color_bar(sheet: Image.Image, draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], top: float) -> None:
    left, upper, right, lower = box
    ramp = colors(np.linspace(1, 0, lower - upper))[:, None].repeat(right - left, 1)
    sheet.paste(Image.fromarray(np.rint(ramp).astype(np.uint8)), (left, upper))
    draw.rectangle((left, upper, right - 1, lower - 1), outline=FAINT)
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = lower - 1 - share * (lower - 1 - upper)
        draw.line((right, y, right + 4, y), fill=FAINT)
        draw.text((right + 8, y), f"{share * top:.2f}", font=font(14), fill=INK, anchor="lm")
