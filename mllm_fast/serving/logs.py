"""Structured logs on stderr, one JSON object per line. They never contain images, prompts, answers or keys."""

from __future__ import annotations

import json
import sys
import time
from typing import Any, TextIO


class Log:
    """Writes events as JSON lines.

    Args:
        stream: Where the lines go, stderr by default; None writes nothing.
    """

    def __init__(self, stream: TextIO | None = sys.stderr):
        self._stream = stream

    def __call__(self, event: str, **facts: Any) -> None:
        if self._stream is None:
            return
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03d}Z"
        self._stream.write(json.dumps({"time": stamp, "event": event, **facts}) + "\n")
        self._stream.flush()
