"""Connections that never become requests: a bound on them, and on how long they may wait."""

from __future__ import annotations

import asyncio
import resource
from collections import OrderedDict
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_RESERVED = 256  # descriptors for the store, the model and the answers under way


class Connections:
    """The connections of a server that have not sent a whole request. Beyond `most` the oldest of them is closed for
    a new one, so that somebody who opens thousands and says nothing keeps nobody out."""

    def __init__(self, most: int | None = None, seconds: float = 15.0):
        self.most = most or max(64, min(4096, raise_descriptors() - _RESERVED))
        self.seconds = seconds
        self.closed = 0
        self._waiting: OrderedDict[int, asyncio.Transport] = OrderedDict()

    def opened(self, key: int, transport: asyncio.Transport) -> None:
        """A new one."""
        self._waiting[key] = transport
        if len(self._waiting) > self.most:
            _, oldest = self._waiting.popitem(last=False)
            self.closed += 1
            oldest.abort()

    def settled(self, key: int) -> None:
        """It sent a request, or is gone."""
        self._waiting.pop(key, None)

    def late(self, key: int) -> None:
        """Its time is over."""
        transport = self._waiting.pop(key, None)
        if transport is not None:
            self.closed += 1
            transport.abort()

    def protocol(self) -> type[HttpToolsProtocol]:
        """uvicorn's protocol, watched."""
        connections = self

        class Watched(HttpToolsProtocol):
            def connection_made(self, transport: Any) -> None:
                super().connection_made(transport)
                connections.opened(id(self), transport)
                self._late = self.loop.call_later(connections.seconds, connections.late, id(self))

            def on_headers_complete(self) -> None:
                self._late.cancel()
                connections.settled(id(self))
                super().on_headers_complete()

            def connection_lost(self, exc: Exception | None) -> None:
                self._late.cancel()
                connections.settled(id(self))
                super().connection_lost(exc)

        return Watched


def raise_descriptors() -> int:
    """As many file descriptors as this process may have; how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return 1 << 20 if hard == resource.RLIM_INFINITY else hard
