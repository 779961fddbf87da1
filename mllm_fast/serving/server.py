"""Run the service with uvicorn."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import uvicorn

from ..core.errors import InputError
from .app import create_app
from .auth import ApiKeys
from .connections import Connections
from .errors import service_error
from .logs import Log
from .metrics import Metrics
from .routes.state import Probes
from .service import Service
from .settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ..vlm import VLM


def application(
    vlm: VLM,
    settings: Settings,
    keys: ApiKeys,
    name: str,
    log: Log | None = None,
    origins: Sequence[str] = (),
) -> tuple[FastAPI, Service]:
    """Create the service of a model, and the HTTP application in front of it.

    Args:
        vlm: The model.
        settings: The limits and defaults of the service.
        keys: The API keys that are accepted.
        name: The name by which requests call the model.
        log: Writes the log, by default to stderr.
        origins: See `create_app`.

    Returns:
        The application and the service.
    """
    service = Service(vlm, settings, name)
    app = create_app(
        service,
        keys,
        metrics=Metrics(service),
        log=log or Log(),
        probes=Probes(lambda: service.engine.alive, lambda: service.engine.failure is None),
        origins=origins,
        start=service.start,
        stop=service.stop,
    )
    return app, service


def serve(
    app: FastAPI,
    service: Service,
    log: Log,
    bound: socket.socket,
    connections: Connections | None = None,
    own_process: bool = False,
    ready: Callable[[], None] = lambda: None,
) -> int:
    """Serve the application until SIGTERM or SIGINT, or until the engine fails.

    The server then refuses new requests and finishes those in progress, within a third of the time of grace.

    Args:
        app: The application.
        service: The service behind it.
        log: Told the address on which the server listens, and when it has stopped.
        bound: The socket of the address, see `bind`. It is closed at the end.
        connections: The limits of connections.
        own_process: Whether the process has no other purpose: it then ends within the time of grace, whatever its
            threads still do.
        ready: Called when requests are answered.

    Returns:
        The exit code of the process: 0, or 1 if the engine failed and the process should be started again.
    """
    with _free(bound):
        bound.listen(2048)
    bound.setblocking(False)
    grace = service.settings.grace
    config = uvicorn.Config(
        app,
        http=(connections or Connections()).protocol(),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, int(grace / 3)),
        lifespan="on",
    )
    server = _Server(config, ready)

    def end(*_: Any) -> None:
        server.should_exit = True

    # a signal can come before uvicorn has its own handler, and uvicorn raises it again when it has shut down
    before = signal.signal(signal.SIGTERM, end)
    log.take_over()
    host, port = bound.getsockname()[:2]
    log("listening", host=host, port=port)

    def failed(error: BaseException) -> None:
        log("engine_failed", error=service_error(error).where or type(error).__name__)
        server.should_exit = True

    service.engine.on_failure = failed
    if own_process:
        threading.Thread(target=_end_in_time, args=(server, grace, log), name="watch", daemon=True).start()
    try:
        with suppress(KeyboardInterrupt):
            server.run([bound])
    finally:
        bound.close()
        log("stopped")
        # a second signal would break off the interpreter's own end
        signal.signal(signal.SIGTERM, signal.SIG_IGN if own_process else before)
    return 0 if service.engine.failure is None else 1


def _end_in_time(server: uvicorn.Server, grace: float, log: Log) -> None:
    """End the process if it is still there at the end of the time of grace."""
    while not server.should_exit:
        time.sleep(0.2)
    time.sleep(grace)
    log("given_up", seconds=grace)
    os._exit(1)


class _Server(uvicorn.Server):
    """A server that tells when it has started."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]):
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()


def bind(host: str, port: int) -> socket.socket:
    """Take an address before anything slow is done. Clients are refused until `serve` listens on it.

    Args:
        host: The address to listen on.
        port: The port to listen on; 0 takes a free one.

    Raises:
        InputError: The port is in use, or the address is not one of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host is an address of this machine, got {host!r} ({error})") from None
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with _free(bound, host, port):
        bound.bind(address)
    return bound


@contextmanager
def _free(bound: socket.socket, host: str = "", port: int = 0) -> Iterator[None]:
    """Close a socket whose address is not free, and say so in an InputError."""
    try:
        yield
    except OSError as error:
        if not host:
            host, port = bound.getsockname()[:2]
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"port {port} of {host} is in use: give another with --port") from None
        raise InputError(f"port {port} of {host} cannot be taken: {error.strerror}; give another with --port") from None
