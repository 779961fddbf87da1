"""Errors as OpenAI's clients know them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InputError, first_line
from .jobs import BusyError, StoppingError

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}


class ServiceError(Exception):
    """What a request is answered with where it cannot be served."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_after: int = 0
    ):
        super().__init__(status, message, code, param, retry_after)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:  # it may cross processes
        return _made_again, (self.status, self.message, self.code, self.param, self.retry_after)

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI spells it."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> Mapping[str, str]:
        found = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def _made_again(status: int, message: str, code: str | None, param: str | None, retry_after: int) -> ServiceError:
    return ServiceError(status, message, code=code, param=param, retry_after=retry_after)


def service_error(error: BaseException) -> ServiceError:
    """Whatever went wrong, as an answer. What the server is to blame for is told in general words alone."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, BusyError):
        return ServiceError(429, "too many requests wait; try again later", code="queue_full", retry_after=1)
    if isinstance(error, StoppingError):
        return ServiceError(503, "the server is stopping; try again later", code="stopping", retry_after=5)
    if isinstance(error, TimeoutError):
        return ServiceError(504, "the answer took longer than the server allows; ask for fewer tokens", code="timeout")
    if isinstance(error, InputError):
        return ServiceError(400, first_line(error) if len(str(error)) > 2000 else str(error))
    return ServiceError(500, f"an unexpected {type(error).__name__} in the server", code="internal")
