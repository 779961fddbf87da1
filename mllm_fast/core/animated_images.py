"""Frames of animated pictures (GIF, WebP, PNG), which Pillow reads: videos that need no other library."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

from .errors import InputError
from .images import reading, to_rgb
from .video import LoadedVideo, PixelLimits, Sampler, Video, check_size, chosen

FORMATS = ("GIF", "WEBP", "PNG")
_BEGINNINGS = (b"GIF8", b"RIFF", b"\x89PNG")
_MAX_FRAMES = 10_000
_DECODED = 20  # times the pixels that the chosen frames may have together
_SHOWN = 100.0  # milliseconds that a frame is shown where the file does not say so


def is_animated(beginning: bytes) -> bool:
    """Return whether a file may be an animated picture, by its first bytes; RIFF holds AVI films as well."""
    return beginning.startswith(_BEGINNINGS) and beginning[8:12] != b"AVI "


def read_animation(
    video: Video, file: str | io.BytesIO, name: str, sampler: Sampler, limits: PixelLimits
) -> LoadedVideo:
    """Read the chosen frames of an animated picture; a still one has one frame.

    Raises:
        InputError: The file is damaged, or has too many frames or pixels, chosen or not.
    """
    with reading(name, FORMATS), Image.open(file, formats=FORMATS) as image:
        total = int(getattr(image, "n_frames", 1))
        check_size(image.size, 1, limits)
        if total > _MAX_FRAMES or total * image.width * image.height > _DECODED * limits.in_all:
            raise InputError(
                f"{name}: the animation has {total:,} frames of {image.width} x {image.height} pixels, which must all"
                f" be decoded to find their times; the limits are {_MAX_FRAMES:,} frames and"
                f" {_DECODED * limits.in_all:,} pixels in all: convert it to MP4, which is not read whole"
            )
        begins, at = [], 0.0
        for number in range(total):
            image.seek(number)
            image.load()  # WebP says only then how long the frame is shown
            begins.append(at / 1000)
            at += _milliseconds(image)
        rate = 1000 * total / at
        picks = chosen(video, total, rate, sampler)
        check_size(image.size, len(picks), limits)
        frames = []
        for pick in picks:
            image.seek(pick)
            frames.append(to_rgb(image.copy()))
    return LoadedVideo(tuple(frames), tuple(picks), tuple(begins[pick] for pick in picks), total, at / 1000)


def _milliseconds(image: Any) -> float:
    found = image.info.get("duration")
    return float(found) if isinstance(found, (int, float)) and found > 0 else _SHOWN
