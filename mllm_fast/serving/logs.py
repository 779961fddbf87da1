"""Structured logs on stderr, a JSON object a line: never an image, a prompt, an answer or a key."""

from __future__ import annotations

import json
import sys
import time
from typing import Any, TextIO


class Log:
    """Writes events. `stream`: stderr by default; None writes nothing."""

    def __init__(self, stream: TextIO | None = sys.stderr):
        self._stream = stream

    def __call__(self, event: str, **facts: Any) -> None:
        if self._stream is None:
            return
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03d}Z"
        self._stream.write(json.dumps({"time": stamp, "event": event, **facts}) + "\n")
        self._stream.flush()
