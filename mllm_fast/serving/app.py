"""The HTTP application: OpenAI's chat completions, contexts, explanations, health and metrics."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI

from .. import __version__
from .auth import ApiKeys
from .backend import Backend
from .logs import Log
from .metrics import Metrics
from .middleware import RequestGuardMiddleware
from .routes import chat, contexts, explanations, ops
from .routes.openapi import ERRORS, describe_errors, handle_errors
from .routes.state import AppState


def create_app(
    backend: Backend,
    keys: ApiKeys,
    *,
    metrics: Metrics,
    log: Log,
    ready: Callable[[], bool],
    start: Callable[[], Awaitable[None]] | None = None,
    stop: Callable[[], None] | None = None,
) -> FastAPI:
    """Create the FastAPI application of the server.

    Args:
        backend: Answers the requests.
        keys: The API keys that are accepted.
        metrics: Counts the requests for Prometheus.
        log: Writes one line for each request.
        ready: Returns whether the server takes requests.
        start: Awaited when the application starts.
        stop: Called when the application stops.

    Returns:
        The application, with all routes, the middleware and the error handlers.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if start is not None:
            await start()
        yield
        if stop is not None:
            stop()

    app = FastAPI(title="mllm-fast", version=__version__, lifespan=lifespan, responses=ERRORS, redirect_slashes=False)
    app.state.mllm_fast = AppState(backend, keys, metrics, ready, int(time.time()))
    app.add_middleware(RequestGuardMiddleware, max_body=backend.settings.max_body, log=log, metrics=metrics)
    handle_errors(app)
    for resource in (chat, ops, contexts, explanations):
        app.include_router(resource.router)
    describe_errors(app)
    return app
