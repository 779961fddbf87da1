"""Drawing of text in images, in lines of limited width and in Pillow's own font."""

from __future__ import annotations

from PIL import ImageDraw, ImageFont

MARGIN = 24
INK, FAINT, PAPER = (28, 28, 32), (110, 110, 118), (255, 255, 255)


class Text:
    """Text that is wrapped to a given width."""

    class Line:
        def __init__(self, text: str, size: int, fill: tuple[int, int, int]):
            self.text, self.size, self.fill, self.height = text, size, fill, round(size * 1.4)

    def __init__(self, width: int):
        self.width = width

    def wrap(self, text: str, size: int, fill: tuple[int, int, int]) -> list[Text.Line]:
        """Return the lines of a text."""
        face, lines, line = font(size), [], ""
        for word in text.split():
            longer = f"{line} {word}".strip()
            if line and face.getlength(longer) > self.width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
        return [self.Line(shorten(one, face, self.width), size, fill) for one in lines]

    def put(self, draw: ImageDraw.ImageDraw, lines: list[Text.Line], y: int) -> int:
        """Draw lines from `y` downwards, and return the `y` of the next line."""
        for line in lines:
            draw.text((MARGIN, y), line.text, font=font(line.size), fill=line.fill)
            y += line.height
        return y


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's own font, which exists on every machine."""
    return ImageFont.load_default(size)


def shorten(text: str, face: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Return the text, cut off with an ellipsis if it is wider than `width`."""
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(text + "\u2026") > width:
        text = text[:-1]
    return text + "\u2026"
