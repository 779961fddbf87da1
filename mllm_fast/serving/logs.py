"""Structured logs on stderr, one JSON object per line.

The server's own events never contain images, prompts, answers or keys. What libraries log and warn of is shortened to
its first line.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
import traceback
import warnings
from collections import deque
from pathlib import Path
from typing import Any, TextIO

_FRAMES = 8  # how many frames of a traceback are logged


def place_of(error: BaseException) -> str:
    """Return an exception's type and the lines of its traceback, innermost first.

    The message is left out, since it may contain a client's data.
    """
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    return f"{type(error).__name__}: {places}"


class Log:
    """Writes events as JSON lines.

    Args:
        stream: Where the lines go, stderr by default; None writes nothing.
    """

    def __init__(self, stream: TextIO | None = sys.stderr):
        self._stream = stream
        self._guard = threading.RLock()
        self._lines: deque[str] = deque()
        self._writing = False

    def __call__(self, event: str, **facts: Any) -> None:
        if self._stream is None:
            return
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03d}Z"
        line = json.dumps({"time": stamp, "event": event, **facts}) + "\n"
        with self._guard:
            self._lines.append(line)
            if self._writing:  # a garbage collection during the write below logs something: it is written then
                return
            self._writing = True
            try:
                while self._lines:
                    self._stream.write(self._lines.popleft())
                self._stream.flush()
            finally:
                self._writing = False

    def take_over(self) -> None:
        """Write what libraries log, warn of and leave uncaught as lines of this log, without tracebacks."""
        root = logging.getLogger()
        root.handlers = [_Lines(self)]
        root.setLevel(logging.WARNING)
        for name in list(logging.root.manager.loggerDict):
            logger = logging.getLogger(name)
            logger.handlers, logger.propagate = [], True

        def warned(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
            self("warning", kind=category.__name__, message=_line(message))

        def uncaught(kind: type[BaseException] | None, error: BaseException | None, *_: Any) -> None:
            self("uncaught", error=place_of(error) if error is not None else str(kind))

        warnings.showwarning = warned
        sys.excepthook = uncaught
        threading.excepthook = lambda args: uncaught(args.exc_type, args.exc_value)
        sys.unraisablehook = lambda args: uncaught(args.exc_type, args.exc_value)


def _line(message: Any) -> str:
    """Return the first line of a library's message."""
    return next(iter(str(message).splitlines()), "")[:500]


class _Lines(logging.Handler):
    """Writes the records of Python's logging as lines of a log."""

    def __init__(self, log: Log):
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, ConnectionAbortedError):  # an answer that had to be broken off has a line of its own
            return
        facts = {} if error is None else {"error": place_of(error)}
        self._log(
            "library", level=record.levelname.lower(), logger=record.name, message=_line(record.getMessage()), **facts
        )
