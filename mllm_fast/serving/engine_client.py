"""From an event loop to the engine's thread: generations and side tasks are submitted, their events awaited."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from .engine import Engine
from .errors import service_error
from .event_queue import EventQueue
from .requests import FailureEvent, FinishEvent, Generation, SideTask


class EngineClient:
    """Used in one event loop. time_limit: seconds that a side task may take, its wait included."""

    def __init__(self, engine: Engine, time_limit: float):
        self.engine, self.time_limit = engine, time_limit
        self._events: EventQueue | None = None

    def start(self) -> None:
        """Begin to work, in the running event loop."""
        self._events = EventQueue(asyncio.get_running_loop())
        self.engine.start()

    async def run(self, make: Callable[[], Iterator[Any]]) -> AsyncIterator[Any]:
        """What the pieces of some work give, each made by the engine's thread between two passes."""
        queue, sink = self.open_queue()
        work = SideTask(make, sink, time.monotonic() + self.time_limit)
        self.submit(work)
        try:
            while not isinstance(event := await queue.get(), FinishEvent):
                if isinstance(event, FailureEvent):
                    raise service_error(event.error)
                yield event
        finally:
            self.engine.cancel(work)

    async def last(self, make: Callable[[], Iterator[Any]]) -> Any:
        """The last of what the pieces of some work give, None if there was none."""
        found: Any = None
        async for piece in self.run(make):
            found = piece
        return found

    def submit(self, wanted: Generation | SideTask) -> None:
        """Hand it to the engine.

        Raises:
            ServiceError: too many wait, or the server is stopping.
        """
        try:
            self.engine.submit(wanted)
        except Exception as error:
            raise service_error(error) from None

    def open_queue(self) -> tuple[asyncio.Queue[Any], Callable[[Any], None]]:
        """A queue of events, and the sink that fills it from the engine's thread."""
        if self._events is None:
            raise RuntimeError("start the service first")
        return self._events.open()
