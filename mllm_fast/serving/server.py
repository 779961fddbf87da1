"""Run the service with uvicorn."""

from __future__ import annotations

import signal
import socket
import sys
from typing import TYPE_CHECKING

import uvicorn

from .app import create_app
from .auth import ApiKeys
from .connections import Connections
from .logs import Log
from .metrics import Metrics
from .service import Service
from .settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ..vlm import VLM

_GRACE = 30  # seconds that requests in progress may take at shutdown


def application(
    vlm: VLM, settings: Settings, keys: ApiKeys, name: str, log: Log | None = None
) -> tuple[FastAPI, Service]:
    """Create the service of a model, and the HTTP application in front of it.

    Args:
        vlm: The model.
        settings: The limits and defaults of the service.
        keys: The API keys that are accepted.
        name: The name by which requests call the model.
        log: Writes the log, by default to stderr.

    Returns:
        The application and the service.
    """
    service = Service(vlm, settings, name)
    app = create_app(
        service,
        keys,
        metrics=Metrics(service),
        log=log or Log(),
        ready=lambda: service.engine.alive,
        start=service.start,
        stop=service.stop,
    )
    return app, service


def serve(app: FastAPI, log: Log, host: str, port: int) -> None:
    """Serve the application until SIGTERM or SIGINT.

    The server then refuses new requests and finishes those in progress.

    Args:
        app: The application.
        log: Told the address on which the server listens, and when it has stopped.
        host: The address to listen on.
        port: The port to listen on; 0 takes a free one.
    """
    listening = _listen(host, port)
    connections = Connections()
    config = uvicorn.Config(
        app,
        http=connections.protocol(),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE,
        lifespan="on",
    )
    server = uvicorn.Server(config)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises the signal again when it has shut down
    log("listening", host=host, port=listening.getsockname()[1])
    try:
        server.run([listening])
    finally:
        listening.close()
        log("stopped")


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
