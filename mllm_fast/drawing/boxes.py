"""Drawing of a detector's boxes and their labels over an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw

from ..core.layout import Box
from .text import PAPER, put_text, text_width

_GOOD, _BAD = (0, 114, 178), (213, 94, 0)  # colours of the Okabe-Ito palette
_SIZE = 15  # of the labels, in pixels


class Labelled(NamedTuple):
    """A box with its label.

    Attributes:
        box: Left, top, right, bottom in pixels of the image.
        label: The text of the label.
        good: Draw the outline solid and blue; otherwise dashed and orange.
    """

    box: Box
    label: str
    good: bool = True


def draw_boxes(picture: Image.Image, boxes: Sequence[Labelled], side: int = 640) -> Image.Image:
    """Return the image with boxes and labels drawn over it, scaled so that its longer side has `side` pixels.

    The last box lies on top.
    """
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    smooth = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    drawn = picture.convert("RGB").resize(size, smooth)
    put_boxes(drawn, boxes, scale)
    return drawn


def put_boxes(drawn: Image.Image, boxes: Sequence[Labelled], scale: float) -> None:
    """Draw boxes and labels on an image.

    Args:
        drawn: The image that is drawn on.
        boxes: The boxes. A label that would cover the label of a later box is left out.
        scale: The factor from the units of the boxes to pixels of `drawn`.
    """
    draw = ImageDraw.Draw(drawn)
    for box, _, good in boxes:
        left, top, right, bottom = (edge * scale for edge in box)
        _outline(draw, (left, top, right, bottom), _GOOD if good else _BAD, good)
    taken: list[Box] = []
    for box, label, good in reversed(boxes):
        left, top, _, bottom = (edge * scale for edge in box)
        width = text_width(label, _SIZE) + 8
        x = min(max(0.0, left), max(0.0, drawn.width - width))
        y = top - 20 if top >= 20 else min(bottom, drawn.height - 20)
        place = (x, y, x + width, y + 19)
        if any(x < other[2] and other[0] < place[2] and y < other[3] and other[1] < place[3] for other in taken):
            continue
        taken.append(place)
        draw.rectangle(place, fill=_GOOD if good else _BAD)
        put_text(drawn, (x + 4, y + 1), label, _SIZE, PAPER)


def _outline(draw: ImageDraw.ImageDraw, box: Box, color: tuple[int, int, int], whole: bool) -> None:
    left, top, right, bottom = box
    if right < left or bottom < top:
        return
    # a light line around the coloured one makes it visible on any background
    draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=PAPER)
    if whole:
        draw.rectangle((left, top, right, bottom), outline=color, width=2)
        return
    for start, end in (((left, top), (right, top)), ((left, bottom), (right, bottom))):
        x = start[0]
        while x < end[0]:
            draw.line((x, start[1], min(x + 8, end[0]), end[1]), fill=color, width=2)
            x += 14
    for start, end in (((left, top), (left, bottom)), ((right, top), (right, bottom))):
        y = start[1]
        while y < end[1]:
            draw.line((start[0], y, end[0], min(y + 8, end[1])), fill=color, width=2)
            y += 14
