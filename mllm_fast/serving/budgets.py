"""Limits on what requests hold and on how often they come, for each client and for all of them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from .errors import ServiceError

_REMEMBERED = 65536  # clients whose rate is known


class ByteBudget:
    """Bytes that requests hold at the same time.

    Args:
        name: What is held, in the plural, for messages.
        most: The largest number of bytes in all.
        each: The largest number of bytes of one client.
    """

    def __init__(self, name: str, most: int, each: int):
        self.name, self.most, self.each = name, most, each
        self.held = 0
        self._of: Counter[str] = Counter()

    def take(self, client: str, count: int) -> None:
        """Add bytes of a client.

        Raises:
            ServiceError: 429, there would be too many.
        """
        if self._of[client] + count > self.each:
            raise self._refused(self.each, "of one client")
        if self.held + count > self.most:
            raise self._refused(self.most, "in all")
        self.held += count
        self._of[client] += count

    def give(self, client: str, count: int) -> None:
        """Return bytes of a client."""
        self.held -= count
        self._of[client] -= count
        if not self._of[client]:
            del self._of[client]

    def _refused(self, limit: int, whose: str) -> ServiceError:
        return ServiceError(
            429,
            f"the {self.name} {whose} hold at most {limit:,} bytes at once; try again later",
            code="too_many_bytes",
            retry_after=1,
        )


class Rate:
    """How many requests a client may send in a second (a token bucket).

    Args:
        second: Requests a second; 0 sets no limit.
        burst: Requests that may come at once.
    """

    def __init__(self, second: float, burst: int):
        self.second, self.burst = second, burst
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # requests left, and when that was

    def count(self, client: str) -> None:
        """Count a request of a client.

        Raises:
            ServiceError: 429, it came too soon.
        """
        if not self.second:
            return
        now = time.monotonic()
        left, then = self._left.pop(client, (float(self.burst), now))
        left = min(float(self.burst), left + (now - then) * self.second)
        self._left[client] = max(0.0, left - 1), now
        if len(self._left) > _REMEMBERED:
            self._left.popitem(last=False)
        if left < 1:
            raise ServiceError(
                429,
                f"a client sends at most {self.second:g} requests a second without a key; try again later",
                code="rate_limit",
                retry_after=1,
            )


class Lane:
    """A lane for one kind of work: so many requests are in it, so many wait for it, and each client has a share.

    Args:
        name: The work, in the plural, for messages.
        width: How many requests are in the lane.
        waiting: How many may wait for it; 0 refuses a request that finds the lane full.
        each: How many requests of one client may be in the lane or wait for it.
    """

    def __init__(self, name: str, width: int, waiting: int, each: int):
        self.name, self.width, self.waiting, self.each = name, width, waiting, each
        self._inside = 0
        self._line: deque[asyncio.Future[None]] = deque()
        self._of: Counter[str] = Counter()

    @asynccontextmanager
    async def place(self, client: str, seconds: float) -> AsyncIterator[None]:
        """Wait for a place, and hold it inside the block; see `enter`."""
        place = await self.enter(client, seconds)
        try:
            yield
        finally:
            place.leave()

    async def enter(self, client: str, seconds: float) -> Place:
        """Wait for a place.

        Args:
            client: Whose request it is.
            seconds: How long to wait.

        Returns:
            The place, held until its `leave` is called.

        Raises:
            ServiceError: 429, too many wait or too many are this client's; 504, no place was free in time.
        """
        if self._of[client] >= self.each:
            raise self._refused(f"one client has at most {self.each} {self.name} at once", "too_many_requests")
        if self._inside >= self.width and len(self._line) >= self.waiting:
            raise self._refused(f"at most {self.width + self.waiting} {self.name} are taken at once", "queue_full")
        self._of[client] += 1
        try:
            await self._enter(seconds)
        except BaseException:
            self._forget(client)
            raise
        return Place(self, client)

    def leave(self, client: str) -> None:
        """Give a place back; for `Place`."""
        self._forget(client)
        self._next()

    async def _enter(self, seconds: float) -> None:
        if self._inside < self.width:
            self._inside += 1
            return
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self._line.append(turn)

        def late() -> None:
            if not turn.done():
                self._line.remove(turn)
                message = f"no place among the {self.name} was free in {seconds:g} s"
                turn.set_exception(ServiceError(504, message, code="timeout"))

        # not `asyncio.wait_for`, which in Python 3.11 loses a cancellation that comes together with the place
        timer = loop.call_later(seconds, late)
        try:
            await turn
        except asyncio.CancelledError:
            if turn in self._line:
                self._line.remove(turn)
            elif not turn.cancelled() and turn.exception() is None:  # the place came with the interruption
                self._next()
            raise
        finally:
            timer.cancel()

    def _next(self) -> None:
        """Hand a place to the next in line, or keep it free."""
        while self._line:
            turn = self._line.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._inside -= 1

    def _forget(self, client: str) -> None:
        self._of[client] -= 1
        if not self._of[client]:
            del self._of[client]

    def _refused(self, why: str, code: str) -> ServiceError:
        return ServiceError(429, f"{why}; try again later", code=code, retry_after=1)


class Place:
    """A place in a lane.

    Args:
        lane: The lane.
        client: Whose place it is.
    """

    def __init__(self, lane: Lane, client: str):
        self._lane, self._client = lane, client
        self._held = True

    def leave(self) -> None:
        """Give the place back; further calls do nothing."""
        if self._held:
            self._held = False
            self._lane.leave(self._client)
