"""Limits on connections: how many there may be, and what each may send before a request is known.

The limits hold on a connection's first request and on each later one. They cost nothing that a client can multiply: no
request exists yet when they act.
"""

from __future__ import annotations

import asyncio
import fcntl
import ipaddress
import resource
import sys
import termios
from collections import Counter, OrderedDict
from contextlib import suppress
from functools import lru_cache
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_LEAST_RATE = 4096  # bytes a second
_RESERVED = 256  # file descriptors for the store, the model and the requests in progress
_HEAD_BYTES = 65536
_PIPELINED = 4


class Connections:
    """The connections of a server.

    A connection is idle while it has sent no complete head of a request and no request of it is in progress. When there
    are too many connections, the one that has been idle longest is closed; if none is idle, the new one is. A client
    that opens thousands of silent connections therefore cannot keep other clients out.

    Args:
        most: The largest number of connections. By default it follows from the number of file descriptors that the
            process may open, less 256, and is 64 to 4096.
        each: The largest number of connections of one client address; by default half of `most`. Addresses of one IPv6
            network of 64 bits count as one.
        seconds: How long a connection may take to send the head of a request (request line and headers). In each such
            time a client reads at least 4 KiB a second of an answer that waits for it.
        head_bytes: The largest head of a request, in bytes.
        pipelined: How many further requests a connection may send before the first is answered.

    Attributes:
        closed: The number of connections that were closed for a limit.
    """

    def __init__(
        self,
        most: int | None = None,
        each: int | None = None,
        seconds: float = 15.0,
        head_bytes: int = _HEAD_BYTES,
        pipelined: int = _PIPELINED,
    ):
        self.most = most or max(64, min(4096, raise_descriptors() - _RESERVED))
        self.each = each or max(1, self.most // 2)
        self.seconds, self.head_bytes, self.pipelined = seconds, head_bytes, pipelined
        self.closed = 0
        self._of: dict[int, str] = {}  # every connection, with its client's address
        self._counts: Counter[str] = Counter()
        self._idle: OrderedDict[int, asyncio.Transport] = OrderedDict()  # longest idle first

    def opened(self, key: int, transport: asyncio.Transport) -> None:
        """Register a new connection, and close one if there are too many."""
        address = client_address(transport.get_extra_info("peername"))
        self._of[key] = address
        self._counts[address] += 1
        self._idle[key] = transport
        if self._counts[address] > self.each:
            self._close(next(one for one in self._idle if self._of[one] == address))
        elif len(self._of) > self.most:
            self._close(next(iter(self._idle)))

    def busy(self, key: int) -> None:
        """Note that a connection has sent the head of a request."""
        self._idle.pop(key, None)

    def idle(self, key: int, transport: asyncio.Transport) -> None:
        """Note that the requests of a connection are answered."""
        if key in self._of:
            self._idle[key] = transport

    def lost(self, key: int) -> None:
        """Forget a connection."""
        self._idle.pop(key, None)
        address = self._of.pop(key, None)
        if address is not None:
            self._counts[address] -= 1
            if not self._counts[address]:
                del self._counts[address]

    def late(self, key: int) -> None:
        """Close a connection whose head took too long."""
        if key in self._idle:
            self._close(key)

    def _close(self, key: int) -> None:
        transport = self._idle[key]
        self.lost(key)
        self.closed += 1
        transport.abort()

    def protocol(self) -> type[HttpToolsProtocol]:
        """Return uvicorn's HTTP protocol class, extended by these limits."""
        return type("Limited", (_LimitedProtocol,), {"limits": self})


class _ReadProtocol(HttpToolsProtocol):
    """A connection that is closed when its client reads an answer that waits for it too slowly."""

    limits: Connections
    _unread: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch(self._left())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unwatch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self, size: int) -> None:
        """Close the connection unless the client has read enough the next time."""
        self._unread = self.loop.call_later(self.limits.seconds, self._check, size)

    def _check(self, before: int) -> None:
        size = self._left()
        if size <= before - _LEAST_RATE * self.limits.seconds:
            self._watch(size)
        else:
            self.limits.closed += 1
            self.transport.abort()

    def _left(self) -> int:
        """Return how many bytes the client has not read: in this process, and in the kernel where it tells.

        The kernel takes more of an answer only when a good part of its own buffer is free again.
        """
        size = self.transport.get_write_buffer_size()
        with suppress(OSError, AttributeError, ValueError):
            number = self.transport.get_extra_info("socket").fileno()
            size += int.from_bytes(fcntl.ioctl(number, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        return size

    def _unwatch(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


class _LimitedProtocol(_ReadProtocol):
    """A connection that reports to its limits, and that is closed when its requests go beyond them."""

    _late: asyncio.TimerHandle | None = None
    _in_head = True
    _heads = 0  # heads that came whole
    _received = _named = 0  # bytes of the next head: those that came, and those of its parts so far
    _refusal = ""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()
        self.limits.opened(id(self), transport)

    def data_received(self, data: bytes) -> None:
        in_head, heads = self._in_head, self._heads
        if in_head and self._late is None and self._answered:
            self._wait()  # the next request has begun
        super().data_received(data)
        if in_head and heads == self._heads and not self.transport.is_closing():
            self._received += len(data)
            if self._received > self.limits.head_bytes:
                self._refusal = "The head of the request is too large."
                self.send_400_response(self._refusal)

    def on_url(self, url: bytes) -> None:
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(name, value)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._received, self._named = False, 0, 0
        self._heads += 1
        if len(self.pipeline) >= self.limits.pipelined:
            self._refuse("Too many requests are sent before the first is answered.")
        self._came()
        self.limits.busy(id(self))
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._answered:
            self.limits.idle(id(self), self.transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._came()
        self.limits.lost(id(self))
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        if self._refusal:
            self.limits.closed += 1
            if self.cycle is not None and not self.cycle.response_complete:
                self.transport.abort()  # a second answer would be taken for that of the request in progress
                return
        super().send_400_response(self._refusal or msg)

    @property
    def _answered(self) -> bool:
        return not self.pipeline and (self.cycle is None or self.cycle.response_complete)

    def _wait(self) -> None:
        self._late = self.loop.call_later(self.limits.seconds, self.limits.late, id(self))

    def _came(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _count(self, *parts: bytes) -> None:
        self._named += sum(map(len, parts))
        if self._named > self.limits.head_bytes:
            self._refuse("The head of the request is too large.")

    def _refuse(self, why: str) -> None:
        self._refusal = why
        raise ValueError(why)  # the parser stops, and uvicorn sends its answer to an invalid request


def client_address(peer: Any) -> str:
    """Return what counts as one client: an IPv4 address, or an IPv6 network of 64 bits; "" if there is none."""
    return _client(str(peer[0])) if isinstance(peer, (tuple, list)) and peer else ""


@lru_cache(maxsize=4096)
def _client(host: str) -> str:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


def raise_descriptors() -> int:
    """Raise the limit of open file descriptors to the most that this process may have, and return that limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return 1 << 20 if hard == resource.RLIM_INFINITY else hard
