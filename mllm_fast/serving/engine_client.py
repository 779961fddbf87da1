"""Submit generations and side tasks from an event loop to the engine's thread, and await their events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from .engine import Engine
from .errors import service_error
from .event_queue import EventQueue
from .requests import FailureEvent, FinishEvent, Generation, SideTask

Order = tuple[dict[str, Any], list[bytes]]


class EngineClient:
    """A client of the engine, for use in one event loop.

    Args:
        engine: The engine.
        time_limit: How many seconds a side task may take, its wait in the queue included.
    """

    def __init__(self, engine: Engine, time_limit: float):
        self.engine, self.time_limit = engine, time_limit
        self._events: EventQueue | None = None

    def start(self) -> None:
        """Start the engine, and deliver its events to the running event loop."""
        self._events = EventQueue(asyncio.get_running_loop())
        self.engine.start()

    async def run(self, make: Callable[[], Iterator[Any]], order: Order | None = None) -> AsyncIterator[Any]:
        """Run a side task in the engine's thread, and yield what its iterator yields.

        Args:
            make: Makes the iterator. The engine's thread advances it by one piece between two forward passes.
            order: See `SideTask`; a divided model runs no task without it.

        Raises:
            ServiceError: The task failed, too many requests wait, or the server is stopping.
        """
        queue, sink = self.open_queue()
        work = SideTask(make, sink, time.monotonic() + self.time_limit, order=order)
        self.submit(work)
        try:
            while not isinstance(event := await queue.get(), FinishEvent):
                if isinstance(event, FailureEvent):
                    raise service_error(event.error)
                yield event
        finally:
            self.engine.cancel(work)

    async def last(self, make: Callable[[], Iterator[Any]], order: Order | None = None) -> Any:
        """Run a side task as `run` does, and return the last piece, or None if there was none."""
        found: Any = None
        async for piece in self.run(make, order):
            found = piece
        return found

    def submit(self, wanted: Generation | SideTask) -> None:
        """Queue a generation or a side task in the engine.

        Raises:
            ServiceError: Too many requests wait, or the server is stopping.
        """
        try:
            self.engine.submit(wanted)
        except Exception as error:
            raise service_error(error) from None

    def open_queue(self, seen: Callable[[Any], None] | None = None) -> tuple[asyncio.Queue[Any], Callable[[Any], None]]:
        """Return a queue of events, and the sink that fills it from the engine's thread; see `EventQueue.open`."""
        if self._events is None:
            raise RuntimeError("start the service first")
        return self._events.open(seen)
