"""Reading of a video from a file or from a list of frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import InputError
from .image_values import is_tensor
from .images import MAX_PIXELS, load_image
from .video import LoadedVideo, PixelLimits, Sampler, Video, check_frames, check_size, chosen, spaced
from .video_file import read_frames

_PIXELS_IN_ALL = 20  # times the limit for one image: what the frames of one video may have together


def load_video(
    video: Any, sampler: Sampler | None = None, max_pixels: int = MAX_PIXELS, in_all: int | None = None
) -> LoadedVideo:
    """Read the frames of a video.

    Args:
        video: A `Video`, or its source.
        sampler: Chooses the frames; by default they are evenly spaced, the first and the last one among them.
        max_pixels: The size of the largest frame that is accepted, in pixels.
        in_all: How many pixels all frames may have together; 20 times `max_pixels` by default.

    Raises:
        InputError: The file does not exist, holds no video stream, is damaged or truncated, or has too many frames or
            pixels, or a reader of videos is not installed.
    """
    if isinstance(video, LoadedVideo):
        return video
    video = video if isinstance(video, Video) else Video(video)
    limits = PixelLimits(max_pixels, _PIXELS_IN_ALL * max_pixels if in_all is None else in_all)
    frames = _listed(video.source)
    if frames is not None:
        return _of_frames(video, frames, sampler or spaced, limits)
    return read_frames(video, sampler or spaced, limits)


def _listed(source: Any) -> Sequence[Any] | None:
    """Return the frames of a list, an array or a tensor, or None for a file."""
    if isinstance(source, np.ndarray) or is_tensor(source):
        if source.ndim != 4:
            raise InputError(
                f"an array of a video is [frames, H, W, C] or [frames, C, H, W], got {list(source.shape)}; give one"
                " picture as an image"
            )
        if isinstance(source, np.ndarray) and source.shape[1] in (1, 3, 4) and source.shape[-1] not in (1, 3, 4):
            source = np.moveaxis(source, 1, -1)
        return source  # type: ignore[return-value]
    return source if isinstance(source, (list, tuple)) else None


def _of_frames(video: Video, frames: Sequence[Any], sampler: Sampler, limits: PixelLimits) -> LoadedVideo:
    total, rate = len(frames), video.frame_rate or 24.0
    if not total:
        raise InputError("the video has no frame; give at least one")
    picks = list(range(total))
    if video.num_frames is None and video.fps is None:
        check_frames(video, total)
    else:
        picks = chosen(video, total, rate, sampler)
    read = []
    for pick in picks:
        read.append(load_image(frames[pick], limits.frame))
        if read[-1].size != read[0].size:
            raise InputError(
                f"the frames of a video have one size, got {read[0].size} and {read[-1].size} (frame {pick})"
            )
        check_size(read[0].size, len(picks), limits)
    return LoadedVideo(tuple(read), tuple(picks), tuple(pick / rate for pick in picks), total, total / rate)
