"""Run the service with uvicorn."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import uvicorn

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
    host: str,
    port: int,
    connections: Connections | None = None,
    own_process: bool = False,
) -> int:
    """Serve the application until SIGTERM or SIGINT, or until the engine fails.

    The server then refuses new requests and finishes those in progress, within a third of the time of grace.

    Args:
        app: The application.
        service: The service behind it.
        log: Told the address on which the server listens, and when it has stopped.
        host: The address to listen on.
        port: The port to listen on; 0 takes a free one.
        connections: The limits of connections.
        own_process: Whether the process has no other purpose: it then ends within the time of grace, whatever its
            threads still do.

    Returns:
        The exit code of the process: 0, or 1 if the engine failed and the process should be started again.
    """
    listening = _listen(host, port)
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
    server = uvicorn.Server(config)

    def end(*_: Any) -> None:
        server.should_exit = True

    # a signal can come before uvicorn has its own handler, and uvicorn raises it again when it has shut down
    before = signal.signal(signal.SIGTERM, end)
    log.take_over()
    log("listening", host=host, port=listening.getsockname()[1])

    def failed(error: BaseException) -> None:
        log("engine_failed", error=service_error(error).where or type(error).__name__)
        server.should_exit = True

    service.engine.on_failure = failed
    if own_process:
        threading.Thread(target=_end_in_time, args=(server, grace, log), name="watch", daemon=True).start()
    try:
        with suppress(KeyboardInterrupt):
            server.run([listening])
    finally:
        listening.close()
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


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except OSError:
        listening.close()
        raise
    listening.setblocking(False)
    return listening
