"""What the attacks share: the server's memory and descriptors, and a client beside them whose answers are timed."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import served
from served import KEY, asked
from waiting import HANG

GIB = 1 << 30
QUESTION = "What color is the star?"
STALL = 0.25  # seconds that the slowest twentieth of the answers may take, whatever those of the other server take


def resident(process: int) -> int:
    """Bytes of memory of a process that are in use."""
    with open(f"/proc/{process}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors(process: int) -> int:
    return len(os.listdir(f"/proc/{process}/fd"))


class Beside:
    """A client that asks one question all the while, and looks at the server's memory.

    A second server that nobody attacks is asked the same at the same moments: what makes its answers late is the
    machine and what else runs there, not the attack.

    Args:
        server: The server.
        twin: The server that is left in peace.
        url: The picture that the question is about; the answer is "blue".
    """

    def __init__(self, server: served.Server, twin: served.Server, url: str):
        self._server, self._twin, self._url = server, twin, url

    def survives(self, attack: Callable[[], None], memory: int = GIB) -> None:
        """Run an attack beside the client, and check what became of its answers and of the memory.

        All answers are right, and memory stays within `memory` bytes of what it was. The slowest twentieth of the
        answers takes no more than 250 ms or twice what it takes the other server meanwhile; since a few answers are a
        small sample, that may take three tries.
        """
        for _ in range(3):
            times, quiet, grown = self._beside(attack)
            assert grown <= memory, grown
            if slowest(times) <= max(STALL, 2 * slowest(quiet)):
                return
        raise AssertionError(f"answers took {slowest(times):.2f} s, {slowest(quiet):.2f} s in peace: {times}, {quiet}")

    def _beside(self, attack: Callable[[], None]) -> tuple[list[float], list[float], int]:
        times: list[float] = []
        quiet: list[float] = []
        ended = threading.Event()
        idle = peak = resident(self._server.process.pid)

        def ask(server: served.Server, into: list[float]) -> None:
            with server.http() as http:
                while not ended.is_set() or len(into) < 5:
                    began = time.perf_counter()
                    reply = http.post("/v1/chat/completions", json={"messages": asked(QUESTION, self._url)})
                    into.append(time.perf_counter() - began)
                    assert reply.status_code == 200, f"{reply.status_code} {reply.text[:200]}"
                    assert reply.json()["choices"][0]["message"]["content"] == "blue", reply.text[:200]
                    time.sleep(0.01)

        def look() -> None:
            nonlocal peak
            while not ended.is_set():
                peak = max(peak, resident(self._server.process.pid))
                time.sleep(0.02)

        with ThreadPoolExecutor(3) as pool:
            try:
                ran = [pool.submit(ask, self._server, times), pool.submit(ask, self._twin, quiet), pool.submit(look)]
                while not (times and quiet) and not any(one.done() for one in ran):
                    time.sleep(0.01)
                attack()
            finally:
                ended.set()
            for one in ran:
                one.result(HANG)
        return times, quiet, peak - idle


def slowest(times: list[float]) -> float:
    """How long the slowest twentieth took at least."""
    return sorted(times)[int(0.95 * (len(times) - 1))]


def connection(server: served.Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=HANG)


def head(path: str, length: int | None = None, key: str | None = KEY, method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: a", "Content-Type: application/json"]
    lines += [f"Authorization: Bearer {key}"] if key else []
    lines += [f"Content-Length: {length}"] if length is not None else []
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def read_some(one: socket.socket) -> bytes:
    """What a connection says first; nothing if it is closed."""
    try:
        return one.recv(65536)
    except OSError:
        return b""
