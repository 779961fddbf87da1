"""Dependencies of the routes: the application's state, and the tenant of a request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.security import HTTPBearer

from ..backend import Backend
from ..metrics import Metrics
from ..replies import Replies


@dataclass(frozen=True)
class Probes:
    """How the server is.

    Attributes:
        ready: Returns whether the server takes requests.
        alive: Returns whether the server can recover by itself.
    """

    ready: Callable[[], bool] = lambda: True
    alive: Callable[[], bool] = lambda: True


@dataclass(frozen=True)
class AppState:
    """The state that all routes share.

    Attributes:
        backend: Answers the requests.
        metrics: Counts the requests.
        probes: Tell how the server is.
        replies: The latest answers, which requests may name.
        began: When the application was created, in seconds since 1970.
    """

    backend: Backend
    metrics: Metrics
    probes: Probes
    replies: Replies
    began: int


async def state_of(request: Request) -> AppState:
    """Return the state of the application that received a request.

    Like the other dependencies it is a coroutine function: FastAPI calls any other one in a thread.
    """
    return request.app.state.mllm_fast


_bearer = HTTPBearer(auto_error=False, description="A key of the server's, where it has any.")


async def tenant_of(request: Request, _: Annotated[Any, Depends(_bearer)] = None) -> str:
    """Return the tenant of a request, whose contexts it may use; the guard has checked its key.

    Raises:
        RuntimeError: The request came past the guard.
    """
    tenant = getattr(request.state, "tenant", None)
    if tenant is None:
        raise RuntimeError("a request came past the guard")
    return tenant


async def client_of(request: Request) -> str:
    """Return what the limits of a request are counted by: its tenant, or its address."""
    return request.state.client


State = Annotated[AppState, Depends(state_of)]
Tenant = Annotated[str, Depends(tenant_of)]
Client = Annotated[str, Depends(client_of)]
