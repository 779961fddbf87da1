"""What the attacks share: the server's memory and descriptors, and a client beside them whose answers are timed."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable

import served
from served import KEY, asked
from waiting import HANG

GIB = 1 << 30
QUESTION = "What color is the star?"
STALL = 0.25  # seconds that the slowest twentieth of the answers may take, unless quiet ones take longer


def resident(process: int) -> int:
    """Bytes of memory of a process that are in use."""
    with open(f"/proc/{process}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors(process: int) -> int:
    return len(os.listdir(f"/proc/{process}/fd"))


class Beside:
    """A client that asks one question all the while, and looks at the server's memory.

    Args:
        server: The server.
        url: The picture that the question is about; the answer is "blue".
        quiet: How long the slowest twentieth of its answers takes when nothing else goes on, in seconds.
    """

    def __init__(self, server: served.Server, url: str, quiet: float = 0.0):
        self._server, self._url, self.quiet = server, url, quiet

    def survives(self, attack: Callable[[], None], memory: int = GIB) -> None:
        """Run an attack beside the client, and check what became of its answers and of the memory.

        All answers are right, and memory stays within `memory` bytes of what it was. The slowest twentieth of the
        answers is not late; since a machine may be busy with something else, that may take three tries.
        """
        for _ in range(3):
            times, wrong, grown = self._beside(attack)
            assert not wrong, wrong[:3]
            assert grown <= memory, grown
            if slowest(times) <= max(STALL, 2 * self.quiet):
                return
        raise AssertionError(f"answers took {slowest(times):.2f} s, {self.quiet:.2f} s when it is quiet: {times}")

    def _beside(self, attack: Callable[[], None]) -> tuple[list[float], list[str], int]:
        times: list[float] = []
        wrong: list[str] = []
        ended = threading.Event()
        idle = peak = resident(self._server.process.pid)

        def ask() -> None:
            with self._server.http() as http:
                while not ended.is_set() or len(times) < 5:
                    began = time.perf_counter()
                    reply = http.post("/v1/chat/completions", json={"messages": asked(QUESTION, self._url)})
                    times.append(time.perf_counter() - began)
                    if reply.status_code != 200 or reply.json()["choices"][0]["message"]["content"] != "blue":
                        wrong.append(f"{reply.status_code} {reply.text[:200]}")
                        return
                    time.sleep(0.01)

        def look() -> None:
            nonlocal peak
            while not ended.is_set():
                peak = max(peak, resident(self._server.process.pid))
                time.sleep(0.02)

        threads = [threading.Thread(target=ask), threading.Thread(target=look)]
        for one in threads:
            one.start()
        try:
            while not times:
                time.sleep(0.01)
            attack()
        finally:
            ended.set()
            for one in threads:
                one.join(HANG)
        return times, wrong, peak - idle


def beside_quiet(server: served.Server, url: str) -> Beside:
    """Return a client that knows how long its answers take when nothing else goes on."""
    made = Beside(server, url)
    times, wrong, _ = made._beside(lambda: time.sleep(2))
    assert not wrong, wrong
    made.quiet = slowest(times)
    return made


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
