"""Figures of an explanation: heatmaps over the image, with a colour bar and the words that they explain."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from ..core.layout import Box
from ..drawing.boxes import Labelled, put_boxes
from ..drawing.heatmap import color_bar, overlay
from ..drawing.text import FAINT, INK, MARGIN, PAPER, Text, put_text, shorten
from .registry import ALIGNMENT, HEATMAP_METHODS, Heads
from .scores import Scores


def draw_token(ex: Scores, token: int, heads: int = 10, method: str = "logprob") -> Image.Image:
    """Draw one token's maps.

    Each image and its map are shown side by side, with the colour bar, the question and the answer. For gradient
    alignment the five boxes of largest weight are drawn as well.
    """
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
        *text.wrap(f"Explained token: \u201c{ex.labels[token]}\u201d ({token + 1} of {len(ex.tokens)})", 22, INK),
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
    y = text.put(sheet, lines, MARGIN)
    y = head_height
    for original, heated in pairs:
        sheet.paste(original, (MARGIN, y))
        sheet.paste(heated, (2 * MARGIN + original.width, y))
        y += original.height + MARGIN
    right = 3 * MARGIN + 2 * pairs[0][0].width
    color_bar(sheet, draw, (right, head_height, right + 20, head_height + pairs[0][0].height), top)
    text.put(sheet, foot, head_height + body)
    return sheet


def draw_sheet(ex: Scores, heads: int = 10, method: str = "logprob") -> Image.Image:
    """Draw one map per token.

    All maps share one scale, so the map of a word that no patch raised stays blank.
    """
    side = 200
    layouts = ex.layout.images
    maps = [
        [token_map(ex, token, method, heads, i)[:2] for i in range(len(layouts))] for token in range(len(ex.tokens))
    ]
    top = max(float(grid.max()) for grids in maps for grid, _ in grids)
    entries = [(overlay(p, np.zeros((1, 1)), (0, 0, 1, 1), 0, side, faded=False), "the image", "") for p in ex.images]
    for index, (token, grids) in enumerate(zip(ex.labels, maps, strict=True)):
        check = ex.verified(index, method, heads)
        found = "" if check is None else f", check: {check.verdict}"
        for picture, (grid, box) in zip(ex.images, grids, strict=True):
            drawn = overlay(picture, grid, box, top, side)
            entries.append((drawn, f"\u201c{token}\u201d", f"up to {float(grid.max()):.2f}{found}"))
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
    text.put(sheet, lines, MARGIN)
    for n, (cell, label, most) in enumerate(entries):
        x = MARGIN + (n % across) * (side + MARGIN)
        y = head_height + (n // across) * tall
        sheet.paste(cell, (x, y))
        put_text(sheet, (x, y + cell.height + 4), shorten(label, 18, side), 18, INK)
        put_text(sheet, (x, y + cell.height + 27), most, 14, FAINT)
    right = MARGIN + across * (side + MARGIN)
    color_bar(sheet, draw, (right, head_height, right + 20, head_height + entries[0][0].height), top)
    text.put(sheet, foot, head_height + rows * tall)
    return sheet


def token_map(
    ex: Scores, token: int, method: str, heads: Heads, image: int = 0
) -> tuple[np.ndarray, Box, list[Labelled]]:
    """Return a token's map of one image, the box in the image that the map covers, and detector boxes to draw."""
    if method != ALIGNMENT:
        return ex.heatmap(token, method, heads, image).double().numpy(), ex.layout.images[image].box, []
    found = ex.box_weights(token, image=image)
    width, height = found.size
    scale = min(1.0, 512 / max(found.size))
    pixels = found.pixels((max(1, round(width * scale)), max(1, round(height * scale))))
    boxes = [Labelled(box, f"{weight:.2f}") for weight, _, box in reversed(found.best(5))]
    return pixels.double().numpy(), (0.0, 0.0, float(width), float(height)), boxes


def _note(ex: Scores, method: str, heads: int) -> str:
    """Return the caption that says what the colours mean."""
    meaning = HEATMAP_METHODS.get(method).meaning
    if method == "logprob":
        meaning = meaning.replace("the best", f"the {min(heads, ex.num_layers * ex.num_heads)} best")
        meaning += f" ({ex.final_norm} norm)"
    if method == ALIGNMENT:
        meaning += ", of each word 0 to 1"
    return f"Colour: {meaning}."
