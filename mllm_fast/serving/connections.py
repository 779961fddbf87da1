"""Limits on connections that have not sent a request: how many there may be, and how long each may wait."""

from __future__ import annotations

import asyncio
import resource
from collections import OrderedDict
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_RESERVED = 256  # file descriptors for the store, the model and the requests in progress


class Connections:
    """The connections of a server that have not yet sent the headers of a request.

    When there are more than `most`, the oldest one is closed. A client that opens thousands of silent connections
    therefore cannot keep other clients out.

    Args:
        most: The largest number of such connections. By default it follows from the number of file descriptors that
            the process may open, less 256, and is 64 to 4096.
        seconds: How long a connection may take to send the headers.
    """

    def __init__(self, most: int | None = None, seconds: float = 15.0):
        self.most = most or max(64, min(4096, raise_descriptors() - _RESERVED))
        self.seconds = seconds
        self.closed = 0
        self._waiting: OrderedDict[int, asyncio.Transport] = OrderedDict()

    def opened(self, key: int, transport: asyncio.Transport) -> None:
        """Register a new connection, and close the oldest one if there are too many."""
        self._waiting[key] = transport
        if len(self._waiting) > self.most:
            _, oldest = self._waiting.popitem(last=False)
            self.closed += 1
            oldest.abort()

    def settled(self, key: int) -> None:
        """Forget a connection that sent a request or was closed."""
        self._waiting.pop(key, None)

    def late(self, key: int) -> None:
        """Close a connection that has waited too long."""
        transport = self._waiting.pop(key, None)
        if transport is not None:
            self.closed += 1
            transport.abort()

    def protocol(self) -> type[HttpToolsProtocol]:
        """Return uvicorn's HTTP protocol class, extended to report its connections to this object."""
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
    """Raise the limit of open file descriptors to the most that this process may have, and return that limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return 1 << 20 if hard == resource.RLIM_INFINITY else hard
