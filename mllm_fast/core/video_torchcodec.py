"""Frames of video files, decoded by torchcodec, where PyAV is not installed and FFmpeg's shared libraries are."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

from .errors import InputError
from .video import LoadedVideo, PixelLimits, Sampler, Video, check_size, chosen


def find_decoder() -> Any | None:
    """Return torchcodec's decoder; None if it is not installed, or FFmpeg's libraries are not found."""
    try:
        import torchcodec
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError):
        return None
    # recent releases are imported without the libraries too, and then name no version of them
    return None if getattr(torchcodec, "ffmpeg_major_version", "") is None else VideoDecoder


def read_by_torchcodec(
    decoder: Any, video: Video, source: str | io.BytesIO, name: str, sampler: Sampler, limits: PixelLimits
) -> LoadedVideo:
    """Read the chosen frames of a file; see `load_video`.

    Args:
        decoder: What `find_decoder` returned.
        video: The choice of frames.
        source: The path, or the file in memory.
        name: What the video is called in errors.
        sampler, limits: As in `load_video`.
    """
    file = source.getvalue() if isinstance(source, io.BytesIO) else source.removeprefix("file:")
    try:
        opened = decoder(file, dimension_order="NHWC", seek_mode="exact")
        about = opened.metadata
        total, rate = int(about.num_frames), float(about.average_fps or 24)
        expected = about.num_frames_from_header or 0
    except (RuntimeError, ValueError, TypeError):
        raise InputError(
            f"{name}: holds no video, or is damaged, truncated or in no format that FFmpeg reads"
        ) from None
    if total < 1 or expected > total:
        raise InputError(f"{name}: the video is truncated: {total} of its {expected} frames are there")
    picks = chosen(video, total, rate, sampler)
    check_size((int(about.width), int(about.height)), len(picks), limits)
    try:
        found = opened.get_frames_at(indices=picks)
    except (RuntimeError, IndexError):
        raise InputError(f"{name}: a frame cannot be decoded; the video is damaged or truncated: convert it") from None
    frames = tuple(Image.fromarray(one.numpy()) for one in found.data)
    first = float(about.begin_stream_seconds or 0.0)
    seconds = tuple(max(0.0, float(one) - first) for one in found.pts_seconds)
    return LoadedVideo(frames, tuple(picks), seconds, total, total / rate)
