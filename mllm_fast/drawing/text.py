"""Drawing of text in images: all scripts, from left to right and from right to left, in lines of limited width.

A letter that no font of the machine has is written as its code point, such as U+4F60.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from .bidi import levels_of
from .fonts import Face, default_face, face_of, shapes_text

MARGIN = 24
INK, FAINT, PAPER = (28, 28, 32), (110, 110, 118), (255, 255, 255)
_ELLIPSIS = "\u2026"


class Text:
    """Text that is wrapped to a given width."""

    class Line:
        def __init__(self, text: str, size: int, fill: tuple[int, int, int]):
            self.text, self.size, self.fill, self.height = text, size, fill, round(size * 1.4)

    def __init__(self, width: int):
        self.width = width

    def wrap(self, text: str, size: int, fill: tuple[int, int, int]) -> list[Text.Line]:
        """Return the lines of a text. A line ends between words, and within one that is longer than a line."""
        lines, line = [], ""
        for unit in _units(text):
            if text_width((line + unit).rstrip(), size) <= self.width:
                line += unit
                continue
            if line.strip():
                lines.append(line)
            line = ""
            for cluster in _clusters(unit):
                if line and text_width((line + cluster).rstrip(), size) > self.width:
                    lines.append(line)
                    line = ""
                line += cluster
        lines.append(line)
        return [self.Line(one.strip(), size, fill) for one in lines]

    def put(self, sheet: Image.Image, lines: list[Text.Line], y: int) -> int:
        """Draw lines from `y` downwards, and return the `y` of the next line."""
        for line in lines:
            put_text(sheet, (MARGIN, y), line.text, line.size, line.fill)
            y += line.height
        return y


def font(size: int) -> ImageFont.FreeTypeFont:
    """Return Pillow's own font, which exists on every machine, for numbers and Latin letters."""
    return default_face().at(size, shaped=False)


def text_width(text: str, size: int) -> float:
    """Return the width of a text, in pixels."""
    return sum(run.width(size) for run in _runs(text))


def put_text(sheet: Image.Image, at: tuple[float, float], text: str, size: int, fill: tuple[int, int, int]) -> None:
    """Draw a text.

    Args:
        sheet: The image that is drawn on.
        at: The left and upper end of the line, in pixels.
        text: The text, in the order in which it is read.
        size: The size of the letters, in pixels.
        fill: The colour.
    """
    x, y = at
    baseline = y + font(size).getmetrics()[0]
    for run in _runs(text):
        run.put(sheet, (x, baseline), size, fill)
        x += run.width(size)


def shorten(text: str, size: int, width: float) -> str:
    """Return the text, cut off with an ellipsis if it is wider than `width`."""
    if text_width(text, size) <= width:
        return text
    clusters = list(_clusters(text))
    while clusters and text_width("".join(clusters) + _ELLIPSIS, size) > width:
        clusters.pop()
    return "".join(clusters) + _ELLIPSIS


class _Run(NamedTuple):
    """A part of a line in one font and one direction.

    Attributes:
        text: The text, in the order in which it is read.
        face: The font; None if there is none that has the letters.
        level: As in the Unicode bidirectional algorithm: text of odd levels goes from right to left.
    """

    text: str
    face: Face | None
    level: int

    def width(self, size: int) -> float:
        text, font, options, scale = self._drawn(size)
        return font.getlength(text, **options) * scale

    def put(self, sheet: Image.Image, at: tuple[float, float], size: int, fill: tuple[int, int, int]) -> None:
        text, font, options, scale = self._drawn(size)
        if self.face is None or self.face.strike is None:
            ImageDraw.Draw(sheet).text(at, text, font=font, fill=fill, anchor="ls", **options)
            return
        # coloured bitmaps of one size: they are drawn in it, and made smaller
        ascent, descent = font.getmetrics()
        drawn = Image.new("RGBA", (max(1, round(font.getlength(text, **options))), ascent + descent))
        ImageDraw.Draw(drawn).text((0, ascent), text, font=font, anchor="ls", embedded_color=True, **options)
        small = drawn.resize((max(1, round(drawn.width * scale)), max(1, round(drawn.height * scale))))
        sheet.paste(small, (round(at[0]), round(at[1] - ascent * scale)), small)

    def _drawn(self, size: int) -> tuple[str, ImageFont.FreeTypeFont, dict[str, Any], float]:
        if self.face is None:
            return "".join(f" U+{ord(one):04X} " for one in self.text), font(max(8, round(0.75 * size))), {}, 1.0
        backward = self.level % 2 == 1
        if self.face is default_face() and not backward:
            return self.text, font(size), {}, 1.0
        face = self.face.at(size)
        scale = 1.0 if self.face.strike is None else size / self.face.strike
        if shapes_text():
            return self.text, face, {"direction": "rtl" if backward else "ltr"}, scale
        return "".join(reversed(list(_clusters(self.text)))) if backward else self.text, face, {}, scale


def _units(text: str) -> Iterator[str]:
    """Yield the parts between which a line may end: words with the spaces behind them, and single wide letters."""
    for word in re.findall(r"\S+\s*", " ".join(text.split())):
        part = ""
        for cluster in _clusters(word):
            wide = unicodedata.east_asian_width(cluster[0]) in "WF" and unicodedata.category(cluster[0])[0] == "L"
            if wide and part:
                yield part
                part = ""
            part += cluster
        yield part


def _clusters(text: str) -> Iterator[str]:
    """Yield letters together with the marks on them."""
    cluster = ""
    for letter in text:
        if cluster and not (_is_mark(letter) or cluster.endswith("\u200d")):
            yield cluster
            cluster = ""
        cluster += letter
    if cluster:
        yield cluster


def _is_mark(letter: str) -> bool:
    """Whether a letter is drawn with the one before it: accents, vowel signs, joiners, shades of emoji."""
    return unicodedata.category(letter) in ("Mn", "Mc", "Me", "Cf") or 0x1F3FB <= ord(letter) <= 0x1F3FF


def _runs(text: str) -> list[_Run]:
    """Return the parts of a line, from left to right."""
    text = "".join(one for one in unicodedata.normalize("NFC", text) if one >= " ")
    parts: list[_Run] = []
    for (face, level), group in groupby(zip(text, _faces(text), levels_of(text), strict=True), lambda one: one[1:]):
        parts.append(_Run("".join(one[0] for one in group), face, level))
    # the order in which they stand: from the highest level down, what is at least at a level is turned around
    for level in range(max((one.level for one in parts), default=0), 0, -1):
        start = 0
        while start < len(parts):
            end = start
            while end < len(parts) and parts[end].level >= level:
                end += 1
            parts[start:end] = reversed(parts[start:end])
            start = end + 1
    return parts


def _faces(text: str) -> list[Face | None]:
    """Return the font of each letter: one for a whole word, if there is one, else one for a letter and its marks."""
    found: list[Face | None] = []
    for word in re.findall(r"\s+|\S+", text):
        whole = face_of("".join(one for one in word if unicodedata.category(one) != "Cf"))
        if whole is not None:
            found += [whole] * len(word)
            continue
        for cluster in _clusters(word):
            face = face_of(cluster) or face_of("".join(one for one in cluster if not _is_mark(one)) or cluster)
            found += [face] * len(cluster)
    return found
