"""Dependencies of the routes: the application's state, and the tenant of a request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from ..auth import ApiKeys
from ..backend import Backend
from ..errors import ServiceError
from ..metrics import Metrics


@dataclass(frozen=True)
class AppState:
    """The state that all routes share.

    Attributes:
        backend: Answers the requests.
        keys: The API keys that are accepted.
        metrics: Counts the requests.
        ready: Returns whether the server takes requests.
        began: When the application was created, in seconds since 1970.
    """

    backend: Backend
    keys: ApiKeys
    metrics: Metrics
    ready: Callable[[], bool]
    began: int


def state_of(request: Request) -> AppState:
    """Return the state of the application that received a request."""
    return request.app.state.mllm_fast


_bearer = HTTPBearer(auto_error=False, description="A key of the server's, where it has any.")


async def tenant_of(
    request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)] = None
) -> str:
    """Return the tenant of a request, whose contexts it may use.

    Raises:
        ServiceError: The API key is missing or not accepted.
    """
    tenant = state_of(request).keys.tenant(None if given is None else given.credentials)
    if tenant is None:
        raise ServiceError(401, "this key is not accepted; send 'Authorization: Bearer KEY'", code="invalid_api_key")
    if tenant:
        request.state.facts["client"] = tenant[:8]
    return tenant


State = Annotated[AppState, Depends(state_of)]
Tenant = Annotated[str, Depends(tenant_of)]
