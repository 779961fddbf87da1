"""Reading of images as a person would see them: upright, 8-bit RGB."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from .errors import InputError, first_line
from .image_urls import is_url, url_bytes
from .image_values import eight_bits, from_array, from_tensor, is_tensor

MAX_PIXELS = 100_000_000  # about 300 MB once decoded; callers can raise this limit
_pillow = Lock()  # guards Image.MAX_IMAGE_PIXELS and the filters of warnings, which are global

_EXIF, _ORIENTATION = b"Exif\0\0", 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# besides these, tensors of torch and objects with a method `read`
ImageSource = Image.Image | str | os.PathLike[str] | np.ndarray | bytes | Any
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_FROM_BYTES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # formats that Pillow reads safely from untrusted files


def load_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image into an upright 8-bit RGB image.

    EXIF rotation is applied, if it can be read; damaged metadata is no reason to refuse an image. Transparent parts are
    laid over white. 16-bit values are scaled to 8 bits. An animation gives its first frame. The result shares nothing
    with the source, and carries no metadata, which would turn it a second time.

    Args:
        source: A path, a URL (http, https or data), a PIL image, the bytes of a file, an open binary file, an array
            [H, W] or [H, W, C], or a tensor of torch [C, H, W] or [H, W, C], with 1, 3 or 4 channels; values are uint8,
            uint16, bool, or floating point from 0 to 1.
        max_pixels: The size of the largest image that is accepted, in pixels.

    Raises:
        InputError: The file does not exist, is no image or is truncated, or has more than `max_pixels` pixels, or the
            values fit no range.
    """
    if isinstance(source, Image.Image):
        return _of_pillow(source, max_pixels)
    if isinstance(source, np.ndarray) or is_tensor(source):
        made = from_array(source) if isinstance(source, np.ndarray) else from_tensor(source)
        return to_rgb(_checked(made, "the array", max_pixels))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _opened(io.BytesIO(bytes(source)), "the image", max_pixels, _FROM_BYTES)
    if isinstance(source, str) and is_url(source):
        return _opened(io.BytesIO(url_bytes(source)), source[:100], max_pixels, _FROM_BYTES)
    if hasattr(source, "read"):
        return _opened(io.BytesIO(file_content(source)), "the file", max_pixels, _FROM_BYTES)
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            "an image is a path, a URL, a PIL image, an array, a tensor, bytes or an open file, got"
            f" {type(source).__name__}"
        )
    path = Path(source)
    try:
        if not path.is_file():
            raise InputError(f"{path}: no such file; give the path of an image")
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty; give an image")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)})") from None
    return _opened(path, str(path), max_pixels)


def file_content(file: Any, what: str = "an image") -> bytes:
    """Return all bytes of an open file, from its beginning if it can go there, as Pillow reads it.

    Raises:
        InputError: The file cannot be read, or is a file of text.
    """
    try:
        if hasattr(file, "seek"):
            with suppress(io.UnsupportedOperation):
                file.seek(0)
        content = file.read()
    except Exception as error:  # whatever the caller's object raises
        raise InputError(f"the open file of {what} cannot be read ({first_line(error)})") from None
    if not isinstance(content, bytes):
        raise InputError(f"an open file of {what} is binary ('rb'), got one of {type(content).__name__}")
    return content


def _of_pillow(image: Image.Image, max_pixels: int) -> Image.Image:
    checked = _checked(image, "the image", max_pixels)
    if getattr(image, "fp", True) is None and getattr(image, "_im", True) is None:  # closed before it was read
        name = getattr(image, "filename", "")
        if not name or not os.path.isfile(name):
            raise InputError("the image was closed before it was read; open it again, or call its `load` before")
        return _opened(Path(name), str(name), max_pixels)
    with reading("the image", None):
        return to_rgb(checked)


def image_size(file: ImageSource, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return the width and height of an image as its file stores it, without decoding its pixels.

    Raises:
        InputError: As `load_image` raises it.
    """
    if isinstance(file, Image.Image):
        return _checked(file, "the image", max_pixels).size
    if isinstance(file, bytes):
        with reading("the image", _FROM_BYTES), Image.open(io.BytesIO(file), formats=_FROM_BYTES) as image:
            return _checked(image, "the image", max_pixels).size
    return load_image(file, max_pixels).size


def stored_orientation(path: Path) -> tuple[tuple[int, int], int]:
    """Return the width and height of an image as its file stores it, and its EXIF orientation, 1 for upright.

    Raises:
        InputError: The file is no image.
    """
    with reading(str(path), None), Image.open(path) as image:
        return image.size, min(8, max(1, _orientation(image)))


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return stored pixels [H, W] as they stand upright, for an EXIF orientation."""
    turn = _TURNS.get(orientation)
    return pixels if turn is None else np.asarray(Image.fromarray(pixels).transpose(turn))


def check_file(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> None:
    """Check a file from a stranger before any other library opens it: its format, and its size in pixels.

    Raises:
        InputError: The file is no image in a format that Pillow reads safely, or has too many pixels.
    """
    with reading("the image", _FROM_BYTES), Image.open(path, formats=_FROM_BYTES) as image:
        _checked(image, "the image", max_pixels)


def _opened(file: Path | io.BytesIO, name: str, max_pixels: int, formats: tuple[str, ...] | None = None) -> Image.Image:
    with reading(name, formats), Image.open(file, formats=formats) as image:
        return to_rgb(_checked(image, name, max_pixels))


@contextmanager
def reading(name: str, formats: tuple[str, ...] | None) -> Iterator[None]:
    """Turn the exceptions of Pillow's readers inside the block into an InputError, and keep its warnings quiet.

    Pillow warns of damaged metadata, which is no fault of the pixels.
    """
    try:
        with _no_limit_of_its_own(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    except InputError:
        raise
    except UnidentifiedImageError:
        known = "a format that Pillow reads (PNG, JPEG, WebP, ...)" if formats is None else ", ".join(formats)
        raise InputError(f"{name}: not an image in {known}") from None
    except Exception as error:  # each of Pillow's readers has its own exceptions for a damaged file
        raise InputError(f"{name}: the image is damaged, truncated or unreadable ({first_line(error)})") from None


@contextmanager
def _no_limit_of_its_own() -> Iterator[None]:
    """Lift Pillow's limit on the image size inside the block.

    Pillow's callers cannot raise the limit for a single image. Our own limit is checked before anything is decoded.
    """
    with _pillow:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to upright 8-bit RGB; palettes, alpha, CMYK, 16 bits and EXIF rotation are handled."""
    image.load()  # some formats have their metadata behind the pixels
    turned = _TURNS.get(_orientation(image))
    made = eight_bits(image)
    if turned is not None:
        made = made.transpose(turned)
    elif made is image:
        made = image.copy()
    made.info = {}
    return made


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image; 1, upright, if there is none that can be read."""
    try:
        found = image.getexif().get(_ORIENTATION)
    except Exception:  # Pillow's readers raise all kinds of exceptions for damaged metadata
        found = None
    return next((one for one in (found, _of_doubled(image)) if isinstance(one, int)), 1)


def _of_doubled(image: Image.Image) -> int | None:
    """Return the orientation of an EXIF block whose header some program wrote twice."""
    raw = image.info.get("exif") or b""
    if not isinstance(raw, bytes) or not raw.startswith(2 * _EXIF):
        return None
    try:
        exif = Image.Exif()
        exif.load(raw[len(_EXIF) :])
        return exif.get(_ORIENTATION)
    except Exception:  # as above
        return None


def _checked(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        raise InputError(_too_large(name, f"{width} x {height}", max_pixels))
    if width == 0 or height == 0:
        raise InputError(f"{name}: the image has no pixels")
    return image


def _too_large(name: str, got: str, max_pixels: int) -> str:
    return (
        f"{name}: {got} pixels, the limit is {max_pixels:,} in all; make the image smaller, or raise the limit"
        " with max_pixels= (--max-pixels)"
    )


def image_files(folder: Path) -> list[Path]:
    """Return the images of a folder and its subfolders, sorted by path.

    Raises:
        InputError: The folder does not exist, or holds no image.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: is no folder of images")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
    if not found:
        raise InputError(f"{folder}: holds no image ({', '.join(ENDINGS)})")
    return found
