"""Figures of an explanation: heatmaps over the image, with a colour bar and the words that they explain."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..core.errors import InputError
from ..core.layout import Box, ImageLayout
from ..drawing.boxes import Labelled, put_boxes
from ..drawing.heatmap import color_bar, overlay
from ..drawing.text import FAINT, INK, MARGIN, PAPER, Text, put_text, shorten, text_width
from .registry import ALIGNMENT, DEFAULT, HEATMAP_METHODS, Heads
from .scores import Scores
from .text_map import DARK, FAINTEST, TextMap, text_map
from .video_figure import contact_body, draw_video_sheet
from .video_maps import VideoMaps


def draw_token(  # long: one sheet, from top to bottom
    ex: Scores, token: int, heads: int = 10, method: str = "logprob", without: Tensor | None = None
) -> Image.Image:
    """Draw one token's maps.

    Each image and its map are shown side by side, with the colour bar, the question and the answer. Below them stands
    the text that the model read, coloured by its part in the word. For gradient alignment the five boxes of largest
    weight are drawn as well.

    Args:
        ex: The explanation.
        token: The token's index.
        heads: As in `Explanation.heatmap`.
        method: The method of the map.
        without: Positions that a third picture leaves out, and marks; none by default.
    """
    maps = [token_map(ex, token, method, heads, i) for i in range(len(ex.images))]
    top = max((float(grid.max()) for grid, _, _ in maps), default=0.0)
    side = 420
    pairs = _pairs(ex, maps, top, without, side)
    bar = 90
    widest = max((sum(one.width + MARGIN for one in row) for row in pairs), default=0)
    width = max(widest + MARGIN + bar, 1000 if ex.layout.videos else 640)
    videos = [
        contact_body(VideoMaps(ex, i), token, method, heads, top, width - 2 * MARGIN - bar)
        for i in range(len(ex.layout.videos))
    ]
    text = Text(width - 2 * MARGIN)
    lines = [
        *text.wrap(f"Question: {ex.prompt}", 18, INK),
        *text.wrap(f"Answer: {ex.text}", 18, INK),
        *text.wrap(f"Explained token: \u201c{ex.labels[token]}\u201d ({token + 1} of {len(ex.tokens)})", 22, INK),
    ]
    lowest = min((float(grid.min()) for grid, _, _ in maps), default=0.0)
    foot = text.wrap(_token_note(ex, token, method, heads, lowest, without), 14, FAINT)
    check = ex.verified(token, method, heads)
    if check is not None:
        foot += text.wrap(f"Check: {check}.", 14, INK)
    head_height = sum(line.height for line in lines) + 2 * MARGIN
    foot_height = sum(line.height for line in foot) + MARGIN
    body = drawn = sum(pair[0].height + MARGIN for pair in pairs) + sum(one.height + MARGIN for one in videos)
    words = colored_text(text_map(ex, token, heads), width - 2 * MARGIN) if method == DEFAULT else None
    if words is not None:
        body += words.height + MARGIN
    sheet = Image.new("RGB", (width, head_height + body + foot_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    y = text.put(sheet, lines, MARGIN)
    y = head_height
    for row in pairs:
        x = MARGIN
        for one in row:
            sheet.paste(one, (x, y))
            x += one.width + MARGIN
        y += row[0].height + MARGIN
    for one in videos:
        sheet.paste(one, (MARGIN, y))
        y += one.height + MARGIN
    if pairs or videos:
        right = MARGIN + sum(one.width + MARGIN for one in (pairs[0] if pairs else videos[:1]))
        color_bar(sheet, draw, (right, head_height, right + 20, head_height + min(side, drawn - MARGIN)), top)
    if words is not None:
        sheet.paste(words, (MARGIN, y))
    text.put(sheet, foot, head_height + body)
    return sheet


def _pairs(
    ex: Scores,
    maps: list[tuple[np.ndarray, Box, list[Labelled]]],
    top: float,
    without: Tensor | None,
    side: int,
) -> list[list[Image.Image]]:
    """Return each still image, its map beside it, and that without some positions if they are given."""
    if without is not None and ex.layout.videos:
        raise InputError("positions are left out of the maps of still images, and this prompt has a video")
    pairs = []
    for picture, (grid, box, boxes), layout in zip(ex.images, maps, ex.layout.images, strict=True):
        if layout.moment is not None:
            continue
        heated = overlay(picture, grid, box, top, side)
        put_boxes(heated, boxes, side / max(picture.size))
        row = [overlay(picture, np.zeros((1, 1)), layout.box, 0, side, faded=False), heated]
        pairs.append(row if without is None else [*row, _without(ex, picture, (grid, box), layout, without)])
    return pairs


def _token_note(ex: Scores, token: int, method: str, heads: int, lowest: float, without: Tensor | None) -> str:
    """Return the caption of one token's maps."""
    note = _note(ex, method, heads)
    if without is not None:
        count = sum(int(torch.isin(layout.positions, without).sum()) for layout in ex.layout.images)
        note += f" On the right, {count} patches are left out (crossed), and the scale is that of the others."
    if lowest < 0:
        note += f" Negative parts (down to {lowest:.3g}) are not drawn."
    if method == ALIGNMENT:
        found = ex.box_weights(token)
        note += f" The detector looks for \u201c{found.query}\u201d; drawn are the five boxes of largest weight."
        note += f" Note: {found.note}." if found.note else ""
    return note


def _without(
    ex: Scores, picture: Image.Image, drawn: tuple[np.ndarray, Box], layout: ImageLayout, without: Tensor
) -> Image.Image:
    """Draw a map without some positions, whose patches are crossed."""
    grid, box = drawn
    left_out = layout.to_grid(torch.isin(layout.positions, without).double()).numpy() > 0
    if left_out.shape != grid.shape:
        raise InputError(
            "this map has a value a pixel, as that of gradient alignment: no patches can be left out of it"
        )
    kept = np.where(left_out, 0.0, grid)
    side = 420
    made = overlay(picture, kept, box, max(0.0, float(kept.max())), side)
    pen, scale = ImageDraw.Draw(made), side / max(picture.size)
    rows, cols = left_out.shape
    across, down = (box[2] - box[0]) / cols * scale, (box[3] - box[1]) / rows * scale
    for row, col in zip(*np.nonzero(left_out), strict=True):
        x, y = box[0] * scale + col * across, box[1] * scale + row * down
        for ends in ((x, y, x + across, y + down), (x, y + down, x + across, y)):
            pen.line(ends, fill=PAPER, width=2)
    return made


def colored_text(found: TextMap, width: int) -> Image.Image:
    """Draw the text that a token could see, each word on the colour of its value, with the sums below."""
    text, size, gap = Text(width), 16, 26
    places: list[tuple[float, int, str, float, tuple[int, int, int] | None, float]] = []
    x, y = 0.0, 0
    for word, value, shade in zip(found.words, found.values.tolist(), found.shades(), strict=True):
        shown = word.strip() or ("\u21b5" if "\n" in word else "")
        x += text_width(" ", size) if word[:1].isspace() and x else 0.0
        wide = text_width(shown, size)
        if x and x + wide > width:
            x, y = 0.0, y + gap
        places.append((x, y, shown, wide, shade if found.strength(value) > FAINTEST else None, found.strength(value)))
        x += wide + 1
    note = text.wrap(found.note, 14, FAINT)
    sheet = Image.new("RGB", (width, y + gap + 8 + sum(line.height for line in note)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for left, upper, shown, wide, fill, strength in places:
        if fill is not None and shown:
            pen.rectangle((left, upper, left + wide, upper + gap - 4), fill=fill)
        put_text(sheet, (left, upper + 2), shown, size, PAPER if fill is not None and strength <= DARK else INK)
    below = y + gap + 8
    for line in note:
        put_text(sheet, (0, below), line.text, line.size, line.fill)
        below += line.height
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
    if ex.layout.videos:
        return _video_sheet(ex, maps, top, method, heads)
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


def _video_sheet(
    ex: Scores, maps: list[list[tuple[np.ndarray, Box]]], top: float, method: str, heads: int
) -> Image.Image:
    """Draw the maps of all tokens of an answer about a video, with the question above and the colour bar beside."""
    notes = []
    for index, grids in enumerate(maps):
        check = ex.verified(index, method, heads)
        notes.append(
            f"up to {max(float(grid.max()) for grid, _ in grids):.2f}" + ("" if check is None else f", {check.verdict}")
        )
    body = draw_video_sheet(ex, [[grid for grid, _ in grids] for grids in maps], top, notes)
    bar, width = 80, max(body.width, 520) + 2 * MARGIN + 80
    text = Text(width - 2 * MARGIN)
    lines = [*text.wrap(f"Question: {ex.prompt}", 18, INK), *text.wrap(f"Answer: {ex.text}", 18, INK)]
    foot = text.wrap(_note(ex, method, heads) + " Shares are those of the whole map of a word.", 14, FAINT)
    head = sum(line.height for line in lines) + 2 * MARGIN
    sheet = Image.new("RGB", (width, head + body.height + sum(line.height for line in foot) + MARGIN), PAPER)
    text.put(sheet, lines, MARGIN)
    sheet.paste(body, (MARGIN, head))
    right = width - MARGIN - bar + 14
    color_bar(sheet, ImageDraw.Draw(sheet), (right, head, right + 20, head + min(220, body.height)), top)
    text.put(sheet, foot, head + body.height)
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
    return f"Colour: {meaning if ex.images else meaning.replace('patch', 'token')}."
