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
        self._waiting: list[tuple[Callable[[Any], None], Any]] = []

    def open(self, seen: Callable[[Any], None] | None = None) -> tuple[asyncio.Queue[Any], Callable[[Any], None]]:
        """Return a queue, and a function that puts events into it from another thread.

        Args:
            seen: Called in the event loop with each event, whether or not the queue is read.
        """
        queue: asyncio.Queue[Any] = asyncio.Queue()

        def told(event: Any) -> None:
            if seen is not None:
                seen(event)
            queue.put_nowait(event)

        return queue, lambda event: self._post(told, event)

    def _post(self, told: Callable[[Any], None], event: Any) -> None:
        with self._guard:
            self._waiting.append((told, event))
            first = len(self._waiting) == 1
        if first:
            with suppress(RuntimeError):  # the loop is closed, so nobody reads the events
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._guard:
            events, self._waiting = self._waiting, []
        for told, event in events:
            told(event)
