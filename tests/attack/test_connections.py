"""Attacks before a request is known: connections, heads and bodies, most of them without a key."""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack, asynccontextmanager, suppress

import httpx
import pytest
import uvicorn
from kit import connection, descriptors, head, read_some, status
from served import OTHER
from waiting import HANG

from mllm_fast.serving.connections import Connections


def test_one_request_and_half_a_head_each(server, beside):
    """As many connections as the process may open: each was answered once, and then goes on with half a head."""

    def attack() -> None:
        with ExitStack() as stack:
            for _ in range(1500):
                one = stack.enter_context(connection(server))
                try:
                    one.sendall(head("/healthz", method="GET"))
                    read_some(one)
                    one.sendall(b"GET /healthz HTTP/1.1\r\nHost:")
                except OSError:
                    continue  # closed to make room
            assert httpx.get(f"{server.url}/healthz", timeout=HANG).status_code == 200

    beside.survives(attack)


def test_thousands_of_pipelined_requests(server, beside):
    def attack() -> None:
        with ExitStack() as stack:
            for _ in range(300):
                one = stack.enter_context(connection(server))
                try:
                    one.sendall(head("/healthz", method="GET") * 150)
                except OSError:
                    continue
            one = stack.enter_context(connection(server))
            try:
                for _ in range(100):
                    one.sendall(head("/healthz", method="GET") * 2000)
            except OSError:
                pass  # closed, long before a million requests wait
            else:
                assert not read_some(one).count(b"HTTP/1.1 200") > 1000

    beside.survives(attack)


@pytest.mark.parametrize("lines", [1, 300_000])
def test_a_head_of_thirty_megabytes(server, beside, lines):
    def attack() -> None:
        with connection(server) as one:
            sent = 0
            try:
                one.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n")
                for i in range(30):
                    part = b"A: " + b"a" * (1 << 20) if lines == 1 else b"A: a\r\n" * (1 << 17)
                    one.sendall(part if i or lines > 1 else b"B: " + part)
                    sent += len(part)
                answer = read_some(one)
            except OSError:
                answer = b"HTTP/1.1 400"
            assert status(answer) in (400, 0)

    beside.survives(attack)


@asynccontextmanager
async def small_server(limits, body: bytes):
    """A server in this process whose connections have these limits, and which answers with a body; yields its port."""
    protocol = limits.protocol()

    async def app(scope, receive, send):
        length = str(len(body)).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        await send({"type": "http.response.body", "body": body})

    config = uvicorn.Config(app, http=protocol, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    config.load()
    listening = await asyncio.get_running_loop().create_server(
        lambda: protocol(config=config, server_state=server.server_state, app_state={}), "127.0.0.1", 0
    )
    yield listening.sockets[0].getsockname()[1]
    listening.close()


def test_heads_that_never_end_are_closed():
    """The time of a head runs for each request of a connection anew."""
    limits = Connections(most=10, each=10, seconds=0.2)

    async def run() -> list[bytes]:
        async with small_server(limits, b"ok") as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            first = await reader.readuntil(b"ok")
            writer.write(b"GET / HTTP/1.1\r\nHost")
            rest = await asyncio.wait_for(reader.read(), HANG)
            writer.close()
        return [first, rest]

    first, rest = asyncio.run(run())
    assert first.startswith(b"HTTP/1.1 200")
    assert rest == b""
    assert limits.closed == 1


@pytest.mark.parametrize(("pause", "whole"), [(0.02, True), (None, False)])
def test_slow_readers(pause, whole):
    """One that reads all the while gets its answer, though the kernel's own buffers stand still for long."""
    limits = Connections(most=10, each=10, seconds=0.1)
    size = 24 << 20

    async def run() -> int:
        async with small_server(limits, bytes(size)) as port:
            with socket.socket() as one:
                one.setblocking(False)
                loop, read = asyncio.get_running_loop(), 0
                await loop.sock_connect(one, ("127.0.0.1", port))
                await loop.sock_sendall(one, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
                if pause is None:
                    while not limits.closed:
                        await asyncio.sleep(0.01)
                with suppress(ConnectionError):
                    while read < size and (part := await loop.sock_recv(one, 1 << 17)):
                        read += len(part)
                        await asyncio.sleep(pause or 0)
                return read

    read = asyncio.run(asyncio.wait_for(run(), HANG))
    assert (read >= size) == whole
    assert limits.closed == (not whole)


def test_the_key_goes_before_the_body(server, beside):
    """Without a key the answer comes on the head alone; what is sent nevertheless is not parsed."""

    def attack() -> None:
        with connection(server) as one:
            one.sendall(head("/v1/chat/completions", 20_000_000, key=None))
            assert status(read_some(one)) == 401
        body = b'{"messages": [' + b"[]," * 10_000_000 + b"[]]}"
        for key in ("", "Bearer sk-another-0123456789"):
            reply = httpx.post(
                f"{server.url}/v1/chat/completions", content=body, headers={"Authorization": key}, timeout=HANG
            )
            assert reply.status_code == 401

    beside.survives(attack)


@pytest.mark.parametrize("key", [OTHER, None])
def test_bodies_that_never_end(server, beside, key):
    """Sixty bodies of 31 MiB, each but for its last byte."""

    def attack() -> None:
        with ExitStack() as stack:
            for _ in range(60):
                one = stack.enter_context(connection(server))
                try:
                    one.sendall(head("/v1/chat/completions", 31 << 20, key=key))
                    for _ in range(30):
                        one.sendall(b"a" * (1 << 20))
                    one.sendall(b"a" * ((1 << 20) - 1))
                except OSError:
                    continue  # refused
            assert descriptors(server.process.pid) < 200

    beside.survives(attack)


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("lists", b'{"messages": [' + b"[]," * 10_000_000 + b"[]]}"),
        ("fields", b'{"messages": [], ' + b",".join(b'"f%d":1' % i for i in range(2_300_000)) + b"}"),
        ("depth", b"[" * 20_000_000),
    ],
)
def test_bodies_of_too_many_values(server, beside, name, body):
    def attack() -> None:
        with server.http() as http:
            for _ in range(2):
                reply = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
                assert reply.status_code == 413
                assert "commas, colons and brackets" in reply.json()["error"]["message"]

    beside.survives(attack)
