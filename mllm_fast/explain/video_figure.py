"""Pictures of a video's maps: the moments that matter below their curve, a sheet of all words, and frames to play."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw

from ..core.moments import Moment, time_label
from ..drawing.heatmap import overlay
from ..drawing.text import FAINT, INK, MARGIN, PAPER, font, put_text, shorten, text_width
from .registry import Heads
from .scores import Scores
from .video_maps import VideoMaps

_CURVE = 90  # pixels of the curve's height
_BAR, _CHOSEN = (196, 196, 206), (148, 38, 104)
_GAP = 10
_SHOWN = 12  # moments of a contact sheet
_COLUMNS = 8  # moments of a sheet of words
_SIDE = 150


def contact_body(video: VideoMaps, token: int, method: str, heads: int, top: float, width: int) -> Image.Image:
    """Draw the curve of a video over time, and the moments that matter most in the order of time.

    Args:
        video: The maps.
        token: The index of the token.
        method, heads: As in `Explanation.heatmap`.
        top: The value that is drawn at full strength.
        width: The width of the picture in pixels.
    """
    shares = video.shares(token, method, heads).numpy()
    curve = video.curve(token, method, heads).numpy()
    moments = video.moments
    chosen = sorted(np.argsort(-shares, kind="stable")[:_SHOWN].tolist())
    across = max(1, (width + _GAP) // (_SIDE + _GAP))
    ex, maps = video.explanation, video.maps(token, method, heads)
    cells = []
    for i in chosen:
        image = video.images[i]
        drawn = overlay(ex.images[image], maps[i].double().numpy(), ex.layout.images[image].box, top, _SIDE)
        cells.append((drawn, time_label(moments[i]), f"{100 * shares[i]:.0f} % of the video's part"))
    tall = max(cell.height for cell, _, _ in cells) + 44
    rows = -(-len(cells) // across)
    sheet = Image.new("RGB", (width, _CURVE + 46 + rows * tall), PAPER)
    put_text(sheet, (0, 0), "Sum of each moment's map; the coloured ones are shown below", 13, FAINT)
    _draw_curve(sheet, curve, moments, set(chosen), width)
    for n, (cell, label, note) in enumerate(cells):
        x, y = n % across * (_SIDE + _GAP), _CURVE + 46 + n // across * tall
        sheet.paste(cell, (x, y))
        put_text(sheet, (x, y + cell.height + 3), label, 15, INK)
        put_text(sheet, (x, y + cell.height + 21), shorten(note, 12, _SIDE), 12, FAINT)
    return sheet


def _draw_curve(sheet: Image.Image, curve: np.ndarray, moments: Sequence[Moment], chosen: set[int], width: int) -> None:
    """Draw a bar for each moment, of the sum of its map, with the times below."""
    pen, count = ImageDraw.Draw(sheet), len(moments)
    high, low = max(0.0, float(curve.max())), min(0.0, float(curve.min()))
    span = (high - low) or 1.0
    upper, lower = 20, _CURVE
    zero = upper + (high / span) * (lower - upper)
    each = width / count
    for i, value in enumerate(curve.tolist()):
        end = zero - value / span * (lower - upper)
        box = (i * each + 1, min(zero, end), max(i * each + 2, (i + 1) * each - 1), max(zero, end) + 1)
        pen.rectangle(box, fill=_CHOSEN if i in chosen else _BAR)
    pen.line((0, zero, width, zero), fill=FAINT)
    label = f"{max(high, -low):.3g}"
    put_text(sheet, (width - text_width(label, 13), 0), label, 13, FAINT)
    last = -1.0
    for i, moment in enumerate(moments):
        text = f"{moment.seconds[0]:.1f} s"
        x = min(i * each + each / 2 - text_width(text, 12) / 2, width - text_width(text, 12))
        if x > last + 8:
            pen.text((max(0, x), lower + 6), text, font=font(12), fill=FAINT)
            last = x + text_width(text, 12)


def draw_video_sheet(ex: Scores, maps: list[list[np.ndarray]], top: float, notes: Sequence[str]) -> Image.Image:
    """Draw a table of maps: a row for each word, a column for each still image and for the moments that matter most.

    Args:
        ex: The explanation.
        maps: The maps of each token and image.
        top: The value that is drawn at full strength.
        notes: What is written below each word.
    """
    raised = np.array([[max(0.0, float(np.clip(grid, 0, None).sum())) for grid in grids] for grids in maps])
    whole = raised.sum(1, keepdims=True)
    shares = np.divide(raised, whole, out=np.zeros_like(raised), where=whole > 0)
    weight = shares.max(0) + [2.0 * (one.moment is None) for one in ex.layout.images]
    columns = sorted(np.argsort(-weight, kind="stable")[:_COLUMNS].tolist())
    side, left = 104, 130
    tall = max(round(side * min(1, picture.height / picture.width)) for picture in ex.images) + 24
    sheet = Image.new("RGB", (left + len(columns) * (side + _GAP), (len(maps) + 1) * tall), PAPER)
    for n, image in enumerate(columns):
        x, layout = left + n * (side + _GAP), ex.layout.images[image]
        plain = overlay(ex.images[image], np.zeros((1, 1)), (0, 0, 1, 1), 0, side, faded=False)
        sheet.paste(plain, (x, 0))
        label = "image" if layout.moment is None else time_label(layout.moment)
        put_text(sheet, (x, plain.height + 2), shorten(label, 13, side), 13, INK)
        for row, grids in enumerate(maps, 1):
            drawn = overlay(ex.images[image], grids[image], layout.box, top, side)
            sheet.paste(drawn, (x, row * tall))
            put_text(sheet, (x, row * tall + drawn.height + 2), f"{100 * shares[row - 1, image]:.0f} %", 12, FAINT)
    for row, (label, note) in enumerate(zip(ex.labels, notes, strict=True), 1):
        put_text(sheet, (0, row * tall + 6), shorten(f"\u201c{label}\u201d", 17, left - 10), 17, INK)
        put_text(sheet, (0, row * tall + 30), shorten(note, 12, left - 10), 12, FAINT)
    return sheet


def played(
    ex: Scores, tokens: Sequence[int], method: str, heads: Heads, side: int = 420
) -> Iterator[tuple[Image.Image, float]]:
    """Yield the frames of an animation: the video once for each word, with the word's map and its curve.

    All frames have one size, and the maps one scale.

    Args:
        ex: The explanation of an answer about a video.
        tokens: The indices of the words.
        method, heads: As in `Explanation.heatmap`.
        side: The longer side of the video, in pixels.

    Yields:
        A frame, and how many seconds it is shown.
    """
    videos = [VideoMaps(ex, number) for number in range(len(ex.layout.videos))]
    maps = {(t, v): one.maps(t, method, heads).double().numpy() for t in tokens for v, one in enumerate(videos)}
    top = max(0.0, *(float(one.max()) for one in maps.values()))
    wide = max(side, 360) + 2 * MARGIN
    wide += wide % 2
    frame_tall = max(round(side * picture.height / max(picture.size)) for picture in ex.images)
    tall = frame_tall + _CURVE + 130
    tall += tall % 2
    for token in tokens:
        for v, video in enumerate(videos):
            curve = video.curve(token, method, heads).numpy()
            moments = video.moments
            for i, image in enumerate(video.images):
                sheet = Image.new("RGB", (wide, tall), PAPER)
                _put_answer(sheet, ex, token, wide)
                box = ex.layout.images[image].box
                drawn = overlay(ex.images[image], maps[token, v][i], box, top, side)
                sheet.paste(drawn, ((wide - drawn.width) // 2, 44))
                put_text(sheet, (MARGIN, 48 + frame_tall), time_label(moments[i]), 15, INK)
                strip = Image.new("RGB", (wide - 2 * MARGIN, _CURVE + 24), PAPER)
                _draw_curve(strip, curve, moments, {i}, strip.width)
                sheet.paste(strip, (MARGIN, 72 + frame_tall))
                yield sheet, _shown_for(moments, i)


def _put_answer(sheet: Image.Image, ex: Scores, token: int, width: int) -> None:
    """Write the words around an explained one, that one in the colour of the maps."""
    x: float = MARGIN
    first = max(0, token - 6)
    for i in range(first, len(ex.labels)):
        word = ex.labels[i]
        wide = text_width(word + " ", 20)
        if x + wide > width - MARGIN:
            break
        put_text(sheet, (x, 10), word, 20, _CHOSEN if i == token else FAINT)
        if i == token:
            ImageDraw.Draw(sheet).line((x, 37, x + wide - text_width(" ", 20), 37), fill=_CHOSEN, width=2)
        x += wide


def _shown_for(moments: Sequence[Moment], i: int) -> float:
    """Return how long a moment is shown in an animation: its own time, between a fifth of a second and one."""
    own = moments[i + 1].seconds[0] - moments[i].seconds[0] if i + 1 < len(moments) else 0.8
    return min(1.0, max(0.2, own))
