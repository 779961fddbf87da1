"""Short video files, written by PyAV: frame i is a grey of 8 i, so that each can be told from the others."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def write(
    path: Path,
    frames: int = 30,
    rate: int = 10,
    *,
    codec: str = "mpeg4",
    shown: Sequence[int] | None = None,
    video: bool = True,
    audio: bool = False,
    size: tuple[int, int] = (64, 48),
) -> Path:
    """Write a file.

    Args:
        path: The file, whose ending says the format.
        frames, rate, codec, size: The frames, and how they are encoded.
        shown: When each frame is shown, in milliseconds; by default `rate` frames a second.
        video, audio: The streams that the file has.
    """
    with av.open(str(path), "w") as container:
        stream = sound = None
        if video:
            stream = container.add_stream(codec, rate=rate)
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            stream.gop_size = 12
            if shown is not None:
                stream.codec_context.time_base = Fraction(1, 1000)
        if audio:
            sound = container.add_stream("aac", rate=16000)
        for i in range(frames if stream is not None else 0):
            pixels = np.full((size[1], size[0], 3), 8 * i % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = i if shown is None else shown[i]
            if shown is not None:
                frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        if stream is not None:
            container.mux(stream.encode())
        for i in range(20 if sound is not None else 0):
            heard = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            heard.rate, heard.pts = 16000, 1024 * i
            container.mux(sound.encode(heard))
        if sound is not None:
            container.mux(sound.encode())
    return path
