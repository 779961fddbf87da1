"""Drawings of an explanation: a heat map over the picture, a colour bar, the words it belongs to."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .explain import Explanation
from .layout import Box, overlaps

_MARGIN = 24
_INK, _FAINT, _PAPER = (28, 28, 32), (110, 110, 118), (255, 255, 255)
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


def draw_token(ex: Explanation, token: int, heads: int = 10) -> Image.Image:
    """One token: each picture and its map side by side, the colour bar, the question, the answer."""
    maps = [ex.heatmap(token, heads=heads, image=i).double().numpy() for i in range(len(ex.images))]
    top = max(float(grid.max()) for grid in maps)
    side = 420
    pairs = []
    for picture, grid, layout in zip(ex.images, maps, ex.layout.images, strict=True):
        heated = overlay(picture, grid, layout.box, top, side)
        pairs.append((overlay(picture, np.zeros((1, 1)), layout.box, 0, side, faded=False), heated))
    bar = 90
    width = max(2 * pair[0].width for pair in pairs) + 3 * _MARGIN + bar
    width = max(width, 640)
    text = _Text(width - 2 * _MARGIN)
    lines = [
        *text.wrap(f"Question: {ex.prompt}", 18, _INK),
        *text.wrap(f"Answer: {ex.text}", 18, _INK),
        *text.wrap(
            f"Explained token: \u201c{ex.tokens[token].strip()}\u201d ({token + 1} of {len(ex.tokens)})", 22, _INK
        ),
    ]
    note = (
        f"Colour: increase of log p(token) by each patch, summed over the {min(heads, ex.num_layers * ex.num_heads)}"
        f" best heads ({ex.norm} norm). Negative parts (down to {min(float(g.min()) for g in maps):.3g}) are not drawn."
    )
    foot = text.wrap(note, 14, _FAINT)
    check = ex.verified(token)
    if check is not None:
        foot += text.wrap(f"Check: {check}.", 14, _INK)
    head_height = sum(line.height for line in lines) + 2 * _MARGIN
    foot_height = sum(line.height for line in foot) + _MARGIN
    body = sum(pair[0].height + _MARGIN for pair in pairs)
    sheet = Image.new("RGB", (width, head_height + body + foot_height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    y = text.put(draw, lines, _MARGIN)
    y = head_height
    for original, heated in pairs:
        sheet.paste(original, (_MARGIN, y))
        sheet.paste(heated, (2 * _MARGIN + original.width, y))
        y += original.height + _MARGIN
    right = 3 * _MARGIN + 2 * pairs[0][0].width
    _color_bar(sheet, draw, (right, head_height, right + 20, head_height + pairs[0][0].height), top)
    text.put(draw, foot, head_height + body)
    return sheet


def draw_sheet(ex: Explanation, heads: int = 10) -> Image.Image:
    """All tokens: a map each, all on one scale, so that a word that no patch raised stays bare."""
    side = 200
    layouts = ex.layout.images
    maps = [
        [ex.heatmap(token, heads=heads, image=i).double().numpy() for i in range(len(layouts))]
        for token in range(len(ex.tokens))
    ]
    top = max(float(grid.max()) for grids in maps for grid in grids)
    entries = [(overlay(p, np.zeros((1, 1)), (0, 0, 1, 1), 0, side, faded=False), "the picture", "") for p in ex.images]
    for index, (token, grids) in enumerate(zip(ex.tokens, maps, strict=True)):
        check = ex.verified(index)
        found = "" if check is None else f", check: {check.verdict}"
        for picture, grid, layout in zip(ex.images, grids, layouts, strict=True):
            drawn = overlay(picture, grid, layout.box, top, side)
            entries.append((drawn, f"\u201c{token.strip()}\u201d", f"up to {float(grid.max()):.2f}{found}"))
    across = min(len(entries), max(3, math.ceil(math.sqrt(len(entries) * 1.6))))
    bar = 80
    width = across * (side + _MARGIN) + _MARGIN + bar
    tall = max(entry[0].height for entry in entries) + 58
    text = _Text(width - 2 * _MARGIN)
    lines = [*text.wrap(f"Question: {ex.prompt}", 18, _INK), *text.wrap(f"Answer: {ex.text}", 18, _INK)]
    note = f"Colour: increase of log p(token) by each patch, summed over the {heads} best heads ({ex.norm} norm)."
    foot = text.wrap(note, 14, _FAINT)
    if ex.verification:
        foot += text.wrap(
            "Check: the highest patches are knocked out; \u201cholds\u201d if log p(token) falls more than without"
            " random or the lowest patches, \u201cfails\u201d if not, \u201copen\u201d if no set of patches moves it.",
            14,
            _FAINT,
        )
    head_height = sum(line.height for line in lines) + 2 * _MARGIN
    rows = math.ceil(len(entries) / across)
    height = head_height + rows * tall + sum(line.height for line in foot) + _MARGIN
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    text.put(draw, lines, _MARGIN)
    for n, (cell, label, most) in enumerate(entries):
        x = _MARGIN + (n % across) * (side + _MARGIN)
        y = head_height + (n // across) * tall
        sheet.paste(cell, (x, y))
        draw.text((x, y + cell.height + 4), _shorten(label, _font(18), side), font=_font(18), fill=_INK)
        draw.text((x, y + cell.height + 27), most, font=_font(14), fill=_FAINT)
    right = _MARGIN + across * (side + _MARGIN)
    _color_bar(sheet, draw, (right, head_height, right + 20, head_height + entries[0][0].height), top)
    text.put(draw, foot, head_height + rows * tall)
    return sheet


def _color_bar(sheet: Image.Image, draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], top: float) -> None:
    left, upper, right, lower = box
    ramp = colors(np.linspace(1, 0, lower - upper))[:, None].repeat(right - left, 1)
    sheet.paste(Image.fromarray(np.rint(ramp).astype(np.uint8)), (left, upper))
    draw.rectangle((left, upper, right - 1, lower - 1), outline=_FAINT)
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = lower - 1 - share * (lower - 1 - upper)
        draw.line((right, y, right + 4, y), fill=_FAINT)
        draw.text((right + 8, y), f"{share * top:.2f}", font=_font(14), fill=_INK, anchor="lm")


class _Text:
    """Wrapped text of one width."""

    class Line:
        def __init__(self, text: str, size: int, fill: tuple[int, int, int]):
            self.text, self.size, self.fill, self.height = text, size, fill, round(size * 1.4)

    def __init__(self, width: int):
        self.width = width

    def wrap(self, text: str, size: int, fill: tuple[int, int, int]) -> list[_Text.Line]:
        font, lines, line = _font(size), [], ""
        for word in text.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > self.width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
        return [self.Line(_shorten(one, font, self.width), size, fill) for one in lines]

    def put(self, draw: ImageDraw.ImageDraw, lines: list[_Text.Line], y: int) -> int:
        for line in lines:
            draw.text((_MARGIN, y), line.text, font=_font(line.size), fill=line.fill)
            y += line.height
        return y


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "\u2026") > width:
        text = text[:-1]
    return text + "\u2026"
