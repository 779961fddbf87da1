"""The HTTP application: OpenAI's chat completions and responses, contexts, explanations, health and metrics."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from .. import __version__
from .auth import ApiKeys
from .backend import Backend
from .logs import Log
from .metrics import Metrics
from .middleware import RequestGuardMiddleware
from .replies import Replies
from .routes import chat, contexts, explanations, ops, responses_api
from .routes.answers import IGNORED
from .routes.openapi import ERRORS, describe_errors, handle_errors
from .routes.state import AppState, Probes


def create_app(
    backend: Backend,
    keys: ApiKeys,
    *,
    metrics: Metrics,
    log: Log,
    probes: Probes,
    origins: Sequence[str] = (),
    start: Callable[[], Awaitable[None]] | None = None,
    stop: Callable[[], None] | None = None,
) -> FastAPI:
    """Create the FastAPI application of the server.

    Args:
        backend: Answers the requests.
        keys: The API keys that are accepted.
        metrics: Counts the requests for Prometheus.
        log: Writes one line for each request.
        probes: Tell how the server is.
        origins: The web pages' origins ("https://app.example.org", or "*") whose scripts may use the server.
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
    app.state.mllm_fast = AppState(backend, metrics, probes, Replies(), int(time.time()))
    app.add_middleware(RequestGuardMiddleware, settings=backend.settings, keys=keys, log=log, metrics=metrics)
    if origins:  # before the guard, since a browser asks for permission without a key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", IGNORED],
        )
    handle_errors(app)
    for resource in (chat, responses_api, ops, contexts, explanations):
        app.include_router(resource.router)
    describe_errors(app)
    return app
