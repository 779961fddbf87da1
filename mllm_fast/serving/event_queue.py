"""Hand events from the engine's thread to an event loop. Events that arrive together wake the loop once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any


class EventQueue:
    """Hands events from another thread to queues of one event loop.

    The sender never waits for a reader. A queue grows to at most the number of events of its answer.

    Args:
        loop: The event loop that reads the queues.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._guard = threading.Lock()
        self._waiting: list[tuple[asyncio.Queue[Any], Any]] = []

    def open(self) -> tuple[asyncio.Queue[Any], Callable[[Any], None]]:
        """Return a queue, and a function that puts events into it from another thread."""
        queue: asyncio.Queue[Any] = asyncio.Queue()
        return queue, lambda event: self._post(queue, event)

    def _post(self, queue: asyncio.Queue[Any], event: Any) -> None:
        with self._guard:
            self._waiting.append((queue, event))
            first = len(self._waiting) == 1
        if first:
            with suppress(RuntimeError):  # the loop is closed, so nobody reads the events
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._guard:
            events, self._waiting = self._waiting, []
        for queue, event in events:
            queue.put_nowait(event)
