"""Animated pictures of a video's maps: .webp and .mp4 files."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

from PIL import Image

from ..core.errors import InputError
from ..core.extras import install_command
from .registry import Heads
from .scores import Scores
from .video_figure import played

_MOST = 2000  # frames of one animation
_RATE = 10  # frames a second of an .mp4
_DESCRIPTION = 0x010E  # of EXIF


def animated(ex: Scores, kind: str, token: int | None, method: str, heads: Heads, made: dict[str, Any]) -> bytes:
    """Return an animation: the video with the map of one word, or once for each word.

    Args:
        ex: The explanation of an answer about a video.
        kind: "webp" or "mp4".
        token: The word; all of them by default.
        method, heads: As in `Explanation.heatmap`.
        made: What the file says about its making.

    Raises:
        InputError: The prompt has no video, the animation would be very long, or PyAV is not installed.
    """
    if not ex.layout.videos:
        raise InputError(f"a .{kind} shows a video, and the prompt has none: save the explanation as .png or .html")
    tokens: Sequence[int] = range(len(ex.tokens)) if token is None else [token]
    count = len(tokens) * sum(map(len, ex.layout.videos))
    if count > _MOST:
        raise InputError(f"the animation would have {count:,} frames, at most {_MOST:,} are written; give a token")
    frames = played(ex, tokens, method, heads)
    return _webp(frames, made) if kind == "webp" else _mp4(frames, made)


def _webp(frames: Iterable[tuple[Image.Image, float]], made: dict[str, Any]) -> bytes:
    shown = list(frames)
    about = Image.Exif()
    about[_DESCRIPTION] = json.dumps(made)
    buffer = io.BytesIO()
    shown[0][0].save(
        buffer,
        "WEBP",
        save_all=True,
        append_images=[image for image, _ in shown[1:]],
        duration=[round(1000 * seconds) for _, seconds in shown],
        loop=0,
        quality=85,
        exif=about,
    )
    return buffer.getvalue()


def _mp4(frames: Iterable[tuple[Image.Image, float]], made: dict[str, Any]) -> bytes:
    try:
        import av
    except ImportError:
        raise InputError(f"an .mp4 is written with PyAV: {install_command('video')}, or save a .webp") from None
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        container.metadata["comment"] = json.dumps(made)
        stream: Any = None
        at = 0
        for image, seconds in frames:
            if stream is None:
                stream = container.add_stream("libx264", rate=_RATE, options={"crf": "18"})
                stream.width, stream.height, stream.pix_fmt = *image.size, "yuv420p"
            for _ in range(max(1, round(seconds * _RATE))):
                frame = av.VideoFrame.from_image(image)
                frame.pts, frame.time_base = at, Fraction(1, _RATE)
                at += 1
                container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()
