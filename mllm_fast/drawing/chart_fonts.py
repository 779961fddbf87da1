"""Fonts for the texts of a matplotlib figure that its own font has not all letters of."""

from __future__ import annotations

from typing import Any

from .fonts import Face, face_of


def set_fonts(figure: Any) -> None:
    """Give each text of a matplotlib figure the fonts that it needs; a letter that no font has is written as U+XXXX.

    Args:
        figure: The figure, just before it is drawn.
    """
    from matplotlib import font_manager
    from matplotlib.text import Text

    own = Face(font_manager.findfont(font_manager.FontProperties())).letters
    for text in figure.findobj(Text):
        families: dict[str, None] = {}
        missing = {one for one in text.get_text() if ord(one) not in own and one >= " "}
        for letter in sorted(missing):
            face = face_of(letter, own=False)
            if face is None or face.path is None or face.strike is not None:  # matplotlib draws no bitmaps
                text.set_text(text.get_text().replace(letter, f"U+{ord(letter):04X}"))
                continue
            font_manager.fontManager.addfont(face.path)
            families[font_manager.get_font(face.path).family_name] = None
        if families:
            text.set_fontfamily([*text.get_fontfamily(), *families])
