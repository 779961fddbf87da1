"""Reading of images as a person would see them: upright, 8-bit RGB."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import InputError, first_line

MAX_PIXELS = 100_000_000  # about 300 MB once decoded; callers can raise this limit
_MADE_HERE = "mllm_fast_made"  # an attribute of images that were converted already, which are not copied again
_pillow_limit = Lock()  # guards Image.MAX_IMAGE_PIXELS, which is global

ImageSource = Image.Image | str | os.PathLike[str] | np.ndarray | bytes
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_FROM_BYTES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # formats that Pillow reads safely from untrusted files


def load_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image into an upright 8-bit RGB image.

    EXIF rotation is applied. Transparent parts are laid over white. 16-bit values are scaled to 8 bits.

    Args:
        source: A path, a PIL image, an array uint8 [H, W, 3], or the bytes of a file.
        max_pixels: The size of the largest image that is accepted, in pixels.

    Raises:
        InputError: The file does not exist, is no image or is truncated, or has more than `max_pixels` pixels.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise InputError(f"an image array is uint8 [H, W, 3], got {source.dtype} {source.shape}")
        return _checked(Image.fromarray(source), "the array", max_pixels).convert("RGB")
    if isinstance(source, Image.Image):
        checked = _checked(source, "the image", max_pixels)
        return source if getattr(source, _MADE_HERE, False) and source.mode == "RGB" else to_rgb(checked)
    if isinstance(source, bytes):
        return _opened(io.BytesIO(source), "the image", max_pixels, _FROM_BYTES)
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(f"an image is a path, a PIL image, an array or bytes, got {type(source).__name__}")
    path = Path(source)
    try:
        if not path.is_file():
            raise InputError(f"{path}: no such file; give the path of an image")
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty; give an image")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)})") from None
    return _opened(path, str(path), max_pixels)


def image_size(file: ImageSource, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return the width and height of an image as its file stores it, without decoding its pixels.

    Raises:
        InputError: As `load_image` raises it.
    """
    if isinstance(file, Image.Image):
        return _checked(file, "the image", max_pixels).size
    if isinstance(file, bytes):
        with _reading("the image", _FROM_BYTES), Image.open(io.BytesIO(file), formats=_FROM_BYTES) as image:
            return _checked(image, "the image", max_pixels).size
    return load_image(file, max_pixels).size


def check_file(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> None:
    """Check a file from a stranger before any other library opens it: its format, and its size in pixels.

    Raises:
        InputError: The file is no image in a format that Pillow reads safely, or has too many pixels.
    """
    with _reading("the image", _FROM_BYTES), Image.open(path, formats=_FROM_BYTES) as image:
        _checked(image, "the image", max_pixels)


def _opened(file: Path | io.BytesIO, name: str, max_pixels: int, formats: tuple[str, ...] | None = None) -> Image.Image:
    with _reading(name, formats), Image.open(file, formats=formats) as image:
        return to_rgb(_checked(image, name, max_pixels))


@contextmanager
def _reading(name: str, formats: tuple[str, ...] | None) -> Iterator[None]:
    """Turn the exceptions of Pillow's readers inside the block into an InputError."""
    try:
        with _no_limit_of_its_own():
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
    with _pillow_limit:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to upright 8-bit RGB; palettes, alpha, CMYK, 16 bits and EXIF rotation are handled."""
    made = _to_rgb(image)
    setattr(made, _MADE_HERE, True)
    return made


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I"):
        # Pillow would clip 16-bit values to 255
        values = np.asarray(image, dtype=np.float64) / 257.0
        image = Image.fromarray(np.rint(values.clip(0, 255)).astype(np.uint8))
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64)) * 255.0
        image = Image.fromarray(np.rint(values.clip(0, 255)).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # `exif_transpose` made a copy


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
