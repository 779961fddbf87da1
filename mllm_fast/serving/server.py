"""Run the service behind uvicorn."""

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

_GRACE = 30  # seconds that requests under way are given at the end


def application(
    vlm: VLM, settings: Settings, keys: ApiKeys, name: str, log: Log | None = None
) -> tuple[FastAPI, Service]:
    """The HTTP application of a model, and the service behind it."""
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
    """Listen until SIGTERM or SIGINT; then finish what runs and refuse what comes. `port` 0 takes a free one."""
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it once more when all is done
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
