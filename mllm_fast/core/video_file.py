"""Frames of video files, decoded by PyAV: the chosen ones alone, each with the time at which the file shows it.

Where PyAV is not installed, torchcodec decodes them. Animated pictures are read by Pillow.
"""

from __future__ import annotations

import io
import logging
import os
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from .animated_images import is_animated, read_animation
from .errors import InputError, first_line
from .extras import install_command
from .image_urls import is_url, url_bytes
from .images import check_file, file_content
from .video import LoadedVideo, PixelLimits, Sampler, Video, check_size, chosen, source_name
from .video_torchcodec import find_decoder, read_by_torchcodec

_log = logging.getLogger(__name__)
_FORMATS = (
    (4, b"ftyp", "mov"),
    (4, b"moov", "mov"),
    (4, b"mdat", "mov"),
    (4, b"wide", "mov"),
    (0, b"\x1a\x45\xdf\xa3", "matroska"),
    (8, b"AVI ", "avi"),
    (0, b"FLV", "flv"),
)
_MAX_FRAMES = 10_000_000  # of a file, whose times are read before frames are chosen


class _Times(NamedTuple):
    """When the frames of a stream are shown, in its own units and in order.

    Attributes:
        shown: The time of each frame.
        keys: The times of those that the decoder can begin with; empty if the file stores no times.
    """

    shown: list[int]
    keys: list[int]


def read_frames(video: Video, sampler: Sampler, limits: PixelLimits) -> LoadedVideo:
    """Read the chosen frames of a file; see `load_video`."""
    name = source_name(video.source)
    source = _opened(video.source)
    if is_animated(_beginning(source)):
        return read_animation(
            video, source.removeprefix("file:") if isinstance(source, str) else source, name, sampler, limits
        )
    if isinstance(source, io.BytesIO) and _format(_beginning(source)) is None:
        raise InputError(f"{name}: not a video in MP4, MOV, WebM, Matroska, AVI or FLV, nor an animated picture")
    try:
        import av
    except ImportError:
        decoder = find_decoder()
        if decoder is not None:
            _log.info("PyAV is not installed: torchcodec decodes %s", name)
            return read_by_torchcodec(decoder, video, source, name, sampler, limits)
        raise InputError(
            f"a video file is read with PyAV: {install_command('video')}, or give the frames as a list of images"
        ) from None
    with _reading(name, av):
        with _stream(av, source, name) as (container, stream):
            times = _times(container, stream, name)
            total, rate, unit = len(times.shown), _rate(stream, times), stream.time_base
            picks = chosen(video, total, rate, sampler)
            check_size((stream.width, stream.height), len(picks), limits)
            frames = _decoded(container, stream, times, picks, limits, jumps=True)
        if len(frames) < len(picks):  # some formats do not jump to where they should
            with _stream(av, source, name) as (container, stream):
                frames = _decoded(container, stream, times, picks, limits, jumps=False)
    if len(frames) < len(picks):
        raise InputError(
            f"{name}: frame {picks[len(frames)]} cannot be decoded; the video is damaged or truncated: convert it"
        )
    first = times.shown[0]
    seconds = tuple(float((times.shown[pick] - first) * unit) for pick in picks)
    return LoadedVideo(tuple(frames), tuple(picks), seconds, total, total / rate)


def _opened(source: Any) -> str | io.BytesIO:
    """Return what PyAV opens: a path, or a file in memory."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(bytes(source))
    if isinstance(source, str) and is_url(source):
        return io.BytesIO(url_bytes(source, "video"))
    if hasattr(source, "read"):
        return io.BytesIO(file_content(source, "a video"))
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            "a video is a path, a URL, bytes, an open file, a list of images, an array or a tensor, got"
            f" {type(source).__name__}"
        )
    path = Path(source)
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the path of a video")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty; give a video")
    return f"file:{path}"  # a name with a colon would otherwise be read as a protocol


def _beginning(source: str | io.BytesIO) -> bytes:
    """Return the first bytes of a file."""
    if isinstance(source, io.BytesIO):
        return source.getvalue()[:16]
    try:
        with open(source.removeprefix("file:"), "rb") as file:
            return file.read(16)
    except OSError as error:
        raise InputError(f"{source.removeprefix('file:')}: cannot be read ({first_line(error)})") from None


def check_media(path: str | os.PathLike[str], max_pixels: int) -> None:
    """Check a file from a stranger before any other library opens it: an image as `check_file` does, a video's format.

    Raises:
        InputError: The file is neither an image nor a video in a format that is read from memory, or too large.
    """
    if _format(_beginning(str(path))) is None:
        check_file(path, max_pixels)


def _format(beginning: bytes) -> str | None:
    """Return FFmpeg's name of a file's format; None if it is none of those that are read from memory."""
    return next((found for at, mark, found in _FORMATS if beginning[at : at + len(mark)] == mark), None)


@contextmanager
def _stream(av: Any, source: Any, name: str) -> Iterator[tuple[Any, Any]]:
    """Open a file, and give its container and its first video stream."""
    # playlists and the like name other files and hosts: none is opened, and a file in memory is what it begins as
    options: dict[str, Any] = {"options": {"protocol_whitelist": "file"}}
    if isinstance(source, io.BytesIO):
        source.seek(0)
        options["format"] = _format(_beginning(source))
    with av.open(source, metadata_errors="ignore", **options) as container:
        # the cover of a piece of music is a video stream too
        films = [one for one in container.streams.video if not one.disposition & av.stream.Disposition.attached_pic]
        if not films:
            kinds = sorted({one.type for one in container.streams} - {"video"})
            raise InputError(f"{name}: holds no video, only {', '.join(kinds) or 'nothing'}; give a video or an image")
        stream = films[0]
        stream.thread_type = "AUTO"
        yield container, stream


@contextmanager
def _reading(name: str, av: Any) -> Iterator[None]:
    """Turn PyAV's exceptions inside the block into an InputError."""
    try:
        yield
    except InputError:
        raise
    except (av.FFmpegError, OSError, ValueError, EOFError) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{name}: the video is damaged or truncated, or no format that FFmpeg reads ({why})") from None


def _times(container: Any, stream: Any, name: str) -> _Times:
    """Read when the frames of a stream are shown, from its packets, without decoding them."""
    shown, keys, unknown, unit = [], [], 0, float(stream.time_base)
    end = 0  # of the last frame
    for packet in container.demux(stream):
        if packet.size == 0:  # the end of the stream
            continue
        if packet.pts is None:
            unknown += 1
        else:
            shown.append(packet.pts)
            end = max(end, packet.pts + (packet.duration or 0))
            if packet.is_keyframe:
                keys.append(packet.pts)
        if len(shown) + unknown > _MAX_FRAMES:
            raise InputError(f"{name}: the video has more than {_MAX_FRAMES:,} frames; cut it")
    found = len(shown) + unknown
    if found == 0:
        raise InputError(f"{name}: the video has no frame; it may be truncated")
    if stream.frames > found:
        raise InputError(f"{name}: the video is truncated: {found} of its {stream.frames} frames are there")
    if not stream.frames and _declared(container, stream) > 1 + 1.1 * (end - min(shown, default=0)) * unit:
        raise InputError(f"{name}: the video is truncated: it ends before the time that it says; cut or convert it")
    if unknown or not keys:  # an old format that stores no times
        step = 1 / (float(stream.average_rate or 24) * unit)
        return _Times([round(i * step) for i in range(found)], [])
    return _Times(sorted(set(shown)), sorted(set(keys)))


def _declared(container: Any, stream: Any) -> float:
    """Return how long a file says that its video lasts, in seconds; 0 if it does not say so."""
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is not None and len(container.streams) == 1:
        return container.duration / 1e6
    return 0.0


def _rate(stream: Any, times: _Times) -> float:
    """Return how many frames a second a stream has on average."""
    span = float((times.shown[-1] - times.shown[0]) * stream.time_base)
    if span > 0:
        return (len(times.shown) - 1) / span
    return float(stream.average_rate or 24)


def _decoded(
    container: Any, stream: Any, times: _Times, picks: list[int], limits: PixelLimits, jumps: bool
) -> list[Image.Image]:
    """Decode the chosen frames, as many of them as can be.

    Args:
        container, stream, times: The file.
        picks: The numbers of the frames.
        limits: How many pixels they may have; the size may change within a stream.
        jumps: Whether the decoder jumps, between distant ones, to the last frame that it can begin with.
    """
    found: list[Image.Image] = []
    frames = _timed(container.decode(stream), times) if not jumps else iter(())
    at = None if jumps else -(1 << 62)  # of the latest frame that was decoded
    for pick in picks:
        wanted = times.shown[pick]
        key = times.keys[max(0, bisect_right(times.keys, wanted) - 1)] if times.keys else times.shown[0]
        if jumps and (at is None or (times.keys and key > at)):
            container.seek(key, stream=stream)
            frames = _timed(container.decode(stream), times)
        at, frame = next(((time, one) for time, one in frames if time >= wanted), (None, None))
        if frame is None or at != wanted:
            return found
        check_size((frame.width, frame.height), len(picks), limits)
        found.append(_upright(frame))
    return found


def _timed(frames: Iterator[Any], times: _Times) -> Iterator[tuple[int, Any]]:
    """Yield decoded frames with their times; where the file stores none, they follow from their number."""
    for number, frame in enumerate(frames):
        if not times.keys:
            yield times.shown[min(number, len(times.shown) - 1)], frame
        elif frame.pts is not None:
            yield frame.pts, frame


def _upright(frame: Any) -> Image.Image:
    """Return a frame as an RGB image, turned as the file says."""
    image = frame.to_image()
    turns = round(getattr(frame, "rotation", 0) / 90) % 4  # counterclockwise
    turn = {
        1: Image.Transpose.ROTATE_90,
        2: Image.Transpose.ROTATE_180,
        3: Image.Transpose.ROTATE_270,
    }.get(turns)
    return image if turn is None else image.transpose(turn)
