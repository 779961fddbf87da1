"""Pixels of every range as 8-bit RGB: 16 and 32 bits, floating point, and arrays of numpy and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from .errors import InputError, first_line

_SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")
_ROUNDED = 1 / 510  # half a step of 8 bits: what resizing leaves outside 0 to 1 by rounding
_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


def is_tensor(value: Any) -> bool:
    """Return whether a value is a tensor of torch, which is not imported for the question."""
    return any(
        kind.__module__.partition(".")[0] == "torch" and kind.__name__ == "Tensor" for kind in type(value).__mro__
    )


def from_tensor(value: Any) -> Image.Image:
    """Return the image of a tensor: [C, H, W] or [H, W, C] with 1, 3 or 4 channels, or grey [H, W].

    If both ends of the shape could be the channels, the first is, as is usual in torch.

    Raises:
        InputError: The tensor has another shape, or values that no range fits.
    """
    try:
        array = value.detach().resolve_conj().resolve_neg().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    except (NotImplementedError, RuntimeError, TypeError) as error:  # sparse, quantized, without data
        raise InputError(f"the tensor of an image is dense and has data ({first_line(error)})") from None
    if array.ndim == 3 and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, 2)
    return from_array(array, "a tensor of an image is [C, H, W] or [H, W, C]")


def from_array(array: np.ndarray, shape: str = "an array of an image is [H, W, C]") -> Image.Image:
    """Return the image of an array: grey [H, W] or [H, W, 1], RGB [H, W, 3] or RGBA [H, W, 4].

    Values are uint8, uint16 (0 to 65,535), bool, or floating point from 0 to 1.

    Raises:
        InputError: The array has another shape or type, or values that no range fits.
    """
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise InputError(f"{shape} with 1, 3 or 4 channels, or grey [H, W], got {array.dtype} {list(array.shape)}")
    if not array.size:
        raise InputError(f"the image has no pixels, its shape is {list(array.shape)}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:  # in either order of bytes
        array = _of_sixteen(array)
    elif np.issubdtype(array.dtype, np.floating):
        least, most = _range(array)
        if least < -_ROUNDED or most > 1 + _ROUNDED:
            raise InputError(
                f"floating point values of an image are 0 to 1, got {least:g} to {most:g}; give 0 to 255 as uint8"
                " (array.astype('uint8')), clip them, or undo what a processor has done to them"
            )
        array = _of_unit(array)
    elif array.dtype != np.uint8:
        raise InputError(f"values of an image are uint8, uint16, bool or floating point, got {array.dtype}")
    return Image.fromarray(np.ascontiguousarray(array))


def eight_bits(image: Image.Image) -> Image.Image:
    """Return an image with 8 bits a channel; transparent pixels are laid over white.

    16-bit values are scaled. 32-bit values are taken as 8-bit or 16-bit ones, and floating point ones as 0 to 1 or 0 to
    255, whichever their range fits.

    Raises:
        InputError: No range fits the values of an image of 32 bits.
    """
    clear = image.info.get("transparency")
    if image.mode in (*_SIXTEEN, "I", "F"):
        values = np.asarray(image)
        image = Image.fromarray(_of_wide(image.mode, values, image.format))
        if isinstance(clear, (int, float)):  # one value is transparent
            image = Image.fromarray(np.where(values == clear, np.uint8(255), np.asarray(image)))
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in _ALPHA or clear is not None:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _of_wide(mode: str, values: np.ndarray, file_format: str | None) -> np.ndarray:
    if mode in _SIXTEEN or (mode == "I" and file_format == "PNG"):  # some releases of Pillow read 16 bits into 32
        return _of_sixteen(values)
    least, most = _range(values)
    if mode == "F" and least >= -_ROUNDED and most <= 1 + _ROUNDED:
        return _of_unit(values)
    if least >= (-0.5 if mode == "F" else 0) and most <= (255.5 if mode == "F" else 255):
        return np.rint(values).clip(0, 255).astype(np.uint8)
    if mode == "I" and least >= 0 and most <= 65535:
        return _of_sixteen(values)
    kind, ranges = ("32-bit", "0 to 255 or 0 to 65,535") if mode == "I" else ("floating point", "0 to 1 or 0 to 255")
    raise InputError(
        f"{kind} values of an image are {ranges}, got {least:g} to {most:g}; scale them yourself, since nobody else"
        " knows what black and white are"
    )


def _of_unit(values: np.ndarray) -> np.ndarray:
    """Return 0 to 1 as 0 to 255, rounded."""
    return np.rint(values.astype(np.float64).clip(0, 1) * 255).astype(np.uint8)


def _of_sixteen(values: np.ndarray) -> np.ndarray:
    """Return 0 to 65,535 as 0 to 255, rounded; in 32 bits, since images may be large."""
    wide = values.astype(np.uint32)
    wide *= 255
    wide += 32767
    wide //= 65535
    return wide.astype(np.uint8)


def _range(values: np.ndarray) -> tuple[float, float]:
    least, most = float(values.min()), float(values.max())
    if not (np.isfinite(least) and np.isfinite(most)):
        raise InputError("the image holds values that are no finite numbers; fill them in first")
    return least, most
