"""Videos as a model reads them: some frames of a file or of a list, each with its place and its time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from .errors import InputError
from .image_urls import is_url
from .moments import Moment

MAX_FRAMES = 768  # callers can raise this limit
VIDEO_ENDINGS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ogv", ".wmv", ".flv", ".3gp")
DEFAULT_FRAMES = 8  # how many are read where neither the caller nor the model's processor says so

Sampler = Callable[[int, float, "int | None", "float | None"], Sequence[int]]
"""Chooses frames: from how many there are, their rate, and how many, or how many a second, are wanted."""


@dataclass(frozen=True, eq=False)
class Video:
    """A video to give to a model in place of an image, with the choice of its frames.

    A path or a URL that ends like a video's ("clip.mp4") may be given alone; it is read as `Video(path)`.

    Args:
        source: A file (its path, an http, https or data URL, its bytes, or an open binary file), or the frames: a list
            of images, or an array or tensor [frames, H, W, C] or [frames, C, H, W] with values as in an image.
        fps: How many frames a second are read.
        num_frames: How many frames are read. By default, and without `fps`, it is what the model's processor is set to
            for a file, 8 where it is set to nothing, and all frames of a list.
        frame_rate: How many frames a second a list of frames shows; 24 by default. A file says it itself.
        as_images: Whether the model reads each frame as an image of its own. By default it does if it has no video
            processor.
        max_frames: The most frames that may be read.

    Raises:
        InputError: Both or a wrong `fps` and `num_frames` were given.
    """

    source: Any
    fps: float | None = None
    num_frames: int | None = None
    frame_rate: float | None = None
    as_images: bool | None = None
    max_frames: int = MAX_FRAMES

    def __post_init__(self) -> None:
        if self.fps is not None and self.num_frames is not None:
            raise InputError("give fps, the frames a second, or num_frames, how many in all, but not both")
        for name in ("fps", "frame_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{name} is above 0, got {value}")
        for name in ("num_frames", "max_frames"):
            value = getattr(self, name)
            if value is not None and (value != int(value) or value < 1):
                raise InputError(f"{name} is a whole number of at least 1, got {value}")


@dataclass(frozen=True, eq=False)
class LoadedVideo:
    """The frames of a video that a model reads.

    Attributes:
        frames: The frames, upright 8-bit RGB images of one size.
        indices: The place of each frame in the source, from 0, ascending.
        seconds: The time at which each frame is shown.
        total: How many frames the source has.
        duration: How long the source lasts, in seconds.
        as_images: As in `Video`.
    """

    frames: tuple[Image.Image, ...]
    indices: tuple[int, ...]
    seconds: tuple[float, ...]
    total: int
    duration: float
    as_images: bool | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the frames in pixels."""
        return self.frames[0].size

    def moment(self, video: int, frames: Iterable[int]) -> Moment:
        """Return the moment of some frames.

        Args:
            video: The index of this video in the prompt.
            frames: Indices of `frames`, ascending.
        """
        those = list(frames)
        ends = self.seconds[those[0]], self.seconds[those[-1]]
        return Moment(video, tuple(self.indices[i] for i in those), ends, bool(self.as_images))


class PixelLimits(NamedTuple):
    """How many pixels a frame, and all frames together, may have."""

    frame: int
    in_all: int


def is_video(source: Any) -> bool:
    """Return whether a source is a video: a `Video`, a loaded one, or a path or URL that ends like one."""
    if isinstance(source, (Video, LoadedVideo)):
        return True
    if not isinstance(source, (str, os.PathLike)):
        return False
    text = str(source)
    if is_url(text):
        return text[:11].lower() == "data:video/" or urlsplit(text).path.lower().endswith(VIDEO_ENDINGS)
    return text.lower().endswith(VIDEO_ENDINGS)


def spaced(total: int, rate: float, num_frames: int | None, fps: float | None) -> list[int]:
    """Return evenly spaced frames, the first and the last one among them; a `Sampler`."""
    wanted = num_frames or DEFAULT_FRAMES
    if fps is not None:
        wanted = max(1, int(total / rate * fps))
    return np.linspace(0, total - 1, min(wanted, total)).round().astype(int).tolist()


def chosen(video: Video, total: int, rate: float, sampler: Sampler) -> list[int]:
    """Return the numbers of the frames of a source that are read.

    Raises:
        InputError: There are more than `max_frames`, or the sampler cannot choose so many.
    """
    try:
        found = sorted({int(one) for one in sampler(total, rate, video.num_frames, video.fps)})
    except ValueError as error:  # the processor's own sampler
        raise InputError(
            f"these frames cannot be read of a video of {total} frames at {rate:g} a second: {error}"
        ) from None
    check_frames(video, len(found))
    if not found or found[0] < 0 or found[-1] >= total:
        raise InputError(f"no frame is left to read of a video of {total} frames; give num_frames")
    return found


def check_frames(video: Video, count: int) -> None:
    """Raise InputError if more frames than `max_frames` would be read."""
    if count > video.max_frames:
        raise InputError(
            f"{count:,} frames of the video would be read, the limit is {video.max_frames:,}: read fewer with"
            " num_frames= or fps= (--frames, --fps), or raise the limit with max_frames= (--frame-limit)"
        )


def check_size(size: tuple[int, int], count: int, limits: PixelLimits) -> None:
    """Raise InputError if frames, each or together, have too many pixels."""
    width, height = size
    limit, got = limits.frame, width * height
    what = "a frame of the video has"
    if got <= limit:
        limit, got, what = limits.in_all, got * count, f"the {count} frames of the video have"
    if got > limit:
        raise InputError(
            f"{what} {got:,} pixels ({width} x {height} each), the limit is {limit:,}; read fewer frames, make them"
            " smaller, or raise the limit with max_pixels= (--max-pixels)"
        )


def source_name(source: Any) -> str:
    """Return what a video's source is called in errors."""
    if isinstance(source, str) and is_url(source):
        return source[:100]
    return str(Path(source)) if isinstance(source, (str, os.PathLike)) else "the video"
