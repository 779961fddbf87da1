"""Checks of a context file's numbers: a right checksum says that nothing was damaged, not that it makes sense."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.moments import Moment

if TYPE_CHECKING:
    from ..runtime.model_runner import ModelRunner

_SIDE = 1 << 20  # pixels of an image's side, tokens of a tile's, and tiles of a canvas'
_FAR = 1 << 31  # positions of a model that names no window


def check_description(description: dict[str, Any], length: int, vlm: ModelRunner) -> None:
    """Check the description of a context of `length` tokens.

    Raises:
        ValueError, TypeError, KeyError: A part is missing, of another type or out of its range.
    """
    text = vlm.text
    _whole("position", description["position"], 1, vlm.prompts.window or _FAR)
    for name in ("prompt", "description"):
        if not isinstance(description[name], str):
            raise TypeError(f"{name} is a text")
        description[name].encode()
    _check_settings(description["settings"], length)
    if description.get("first_token") is not None:
        _whole("first_token", description["first_token"], 0, text.head.out_features - 1)
    for name in ("separators", "timestamps"):
        _ascending(name, description.get(name, []), length)
    seen: set[int] = set()
    for image in description["images"]:
        _check_image(image, length)
        if seen.intersection(image["positions"]):
            raise ValueError("two images share positions")
        seen.update(image["positions"])


def check_finite(tensors: dict[str, Tensor]) -> None:
    """Raise ValueError if a tensor holds a value that is no finite number."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds values that are not finite")


def _check_settings(settings: Any, length: int) -> None:
    if not isinstance(settings, dict):
        raise TypeError("settings are an object")
    keep = settings["keep"]
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep < math.inf:
        raise ValueError(f"keep is a share or a count, got {keep!r}")
    _whole("kept", settings["kept"], 0, length)
    for name in ("score", "parts"):
        if not isinstance(settings[name], str):
            raise TypeError(f"{name} is a text")


def _check_moment(moment: Any) -> None:
    if not isinstance(moment, dict) or set(moment) != set(Moment._fields):
        raise ValueError(f"a moment of a video has {', '.join(Moment._fields)}")
    _whole("video of a moment", moment["video"], 0, _FAR)
    _ascending("frames of a moment", moment["frames"], _FAR)
    first, last = moment["seconds"]
    if not moment["frames"] or not isinstance(moment["as_image"], bool) or not 0 <= first <= last < math.inf:
        raise ValueError("a moment of a video has frames, and ends after it begins")


def _check_image(image: dict[str, Any], length: int) -> None:
    _ascending("positions of an image", image["positions"], length)
    if not image["positions"]:
        raise ValueError("an image has no positions")
    if image.get("moment") is not None:
        _check_moment(image["moment"])
    for name in ("size", "canvas"):
        pair = image[name]
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"{name} is a pair of numbers")
        for one in pair:
            _whole(name, one, 1, _SIDE)
    _whole("first", image.get("first", 0), 0, len(image["tiles"]))
    for tile in image["tiles"]:
        for name in ("rows", "cols"):
            _whole(name, tile[name], 1, _SIDE)
        box = tile["box"]
        if len(box) != 4 or not all(isinstance(one, (int, float)) and math.isfinite(one) for one in box):
            raise ValueError("a box is four finite numbers")


def _ascending(name: str, numbers: Sequence[Any], length: int) -> None:
    last = -1
    for one in numbers:
        _whole(name, one, 0, length - 1)
        if one <= last:
            raise ValueError(f"{name} ascend")
        last = one


def _whole(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} is a whole number from {least} to {most}, got {repr(value)[:40]}")
