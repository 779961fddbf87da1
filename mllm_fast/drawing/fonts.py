"""Fonts that have the letters of a text: Pillow's own, and those of the system, found through fontconfig.

Pillow's own font has Latin letters alone. Any other letter is looked for in the fonts that fontconfig proposes for it,
or, where fontconfig is not installed, in those that matplotlib finds.
"""

from __future__ import annotations

import io
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec

from fontTools.ttLib import TTFont, TTLibError
from PIL import ImageFont, features

# scripts whose letters change with their neighbours, which Pillow draws right with libraqm alone
_JOINED = ((0x0600, 0x08FF), (0x0900, 0x0DFF), (0x0E00, 0x1CFF), (0xA8E0, 0xAAFF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFC))


@cache
def shapes_text() -> bool:
    """Whether Pillow can join letters and write from right to left, which it does by libraqm and FriBiDi."""
    return bool(features.check("raqm") and features.check("fribidi"))


class Face:
    """A font.

    Args:
        path: The file of the font; None for Pillow's own.
        index: The number of the font in its file.

    Attributes:
        path: The file of the font; None for Pillow's own.
        letters: The code points that the font has.
        strike: The only size in which it can be drawn, in pixels, if it consists of coloured bitmaps; else None.

    Raises:
        OSError: The file is not a font that can be read.
    """

    def __init__(self, path: str | None = None, index: int = 0):
        self.path, self._index = path, index
        try:
            with TTFont(
                _file() if path is None else path, fontNumber=index if path is not None else -1, lazy=True
            ) as font:
                self.letters = frozenset(font.getBestCmap() or ())
                self.strike = _strike(font)
                drawn = self.strike is not None or any(table in font for table in ("glyf", "CFF ", "CFF2"))
        except (TTLibError, AssertionError, KeyError, ValueError) as error:
            raise OSError(f"{path} is not a font that can be read: {error}") from None
        if not drawn:
            raise OSError(f"{path} has no outlines that can be drawn")

    @cache  # noqa: B019  # faces are kept as long as the process
    def at(self, size: int, shaped: bool = True) -> ImageFont.FreeTypeFont:
        """Return the font in a size, in pixels; one of bitmaps comes in its own size.

        Args:
            size: The size.
            shaped: Join letters and write from right to left, where `shapes_text` can. Pillow's own font, which has
                Latin letters alone, stands more evenly without.
        """
        if self.path is None and not shaped:
            return _own(size)
        engine = ImageFont.Layout.RAQM if shapes_text() else ImageFont.Layout.BASIC
        file = _file() if self.path is None else self.path
        return ImageFont.truetype(file, self.strike or size, self._index, layout_engine=engine)


def _own(size: int = 16) -> ImageFont.FreeTypeFont:
    found = ImageFont.load_default(size)
    assert isinstance(found, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return found


def _file() -> io.BytesIO:
    """Return the file of Pillow's own font, which Pillow itself opens for plain text alone."""
    file = _own().path
    assert isinstance(file, io.BytesIO)
    return io.BytesIO(file.getvalue())


def _strike(font: TTFont) -> int | None:
    if "CBLC" in font:
        return max(int(one.bitmapSizeTable.ppemY) for one in font["CBLC"].strikes)
    if "sbix" in font:
        return max(int(size) for size in font["sbix"].strikes)
    return None


@cache
def default_face() -> Face:
    """Return Pillow's own font, which every machine has."""
    return Face()


_FOUND: list[Face] = []  # the system's fonts that were needed so far


def face_of(text: str, own: bool = True) -> Face | None:
    """Return a font that has all letters of a text, or None.

    Args:
        text: A letter, or letters that had better look alike.
        own: Take Pillow's own font if it has them.
    """
    wanted = frozenset(map(ord, text))
    if not shapes_text() and any(low <= one <= high for one in wanted for low, high in _JOINED):
        return None
    for face in ([default_face()] if own else []) + _FOUND:
        if wanted <= face.letters:
            return face
    return _of_system(wanted)


@cache
def _of_system(wanted: frozenset[int]) -> Face | None:
    for path, index in _candidates(wanted):
        face = _opened(path, index)
        if face is not None and wanted <= face.letters:
            _FOUND.append(face)
            return face
    return None


@cache
def _opened(path: str, index: int) -> Face | None:
    try:
        return Face(path, index)
    except OSError:
        return None


def _candidates(wanted: frozenset[int]) -> Iterator[tuple[str, int]]:
    """Yield files that may have some letters, and the numbers of the fonts in them, the most fitting first."""
    program = shutil.which("fc-match")
    if program is not None:
        letters = " ".join(f"{one:x}" for one in sorted(wanted))
        command = [program, "--sort", f"sans-serif:charset={letters}", "--format", "%{index} %{file}\n"]
        try:
            listed = subprocess.run(command, capture_output=True, timeout=20, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            listed = b""
        for line in listed.decode("utf-8", "surrogateescape").splitlines():
            index, _, path = line.partition(" ")
            if path and index.lstrip("-").isdigit():
                yield path, int(index) & 0xFFFF  # what is above numbers the weights of a variable font
    if find_spec("matplotlib") is not None:  # it brings DejaVu Sans, and knows the folders of each system
        from matplotlib import font_manager

        yield font_manager.findfont("DejaVu Sans"), 0
        if program is None:
            yield from ((path, 0) for path in sorted(font_manager.findSystemFonts()))
