"""Errors in the form that OpenAI's clients expect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core.errors import InputError, first_line
from .logs import place_of
from .requests import BusyError, StoppingError

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
    """An error that is sent as the answer to a request.

    Args:
        status: The HTTP status.
        message: The text for the client.
        code: A short name of the error, for programs.
        param: The field of the request that is wrong.
        retry_after: After how many seconds the client may try again; 0 sends no Retry-After header.
        where: Where the server itself failed. It is only logged, never sent.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int = 0,
        where: str = "",
    ):
        super().__init__(status, message, code, param, retry_after, where)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after
        self.where = where  # where the server itself failed, only for the log

    def __reduce__(self) -> tuple[Any, ...]:  # Ray pickles errors between processes
        return _made_again, (self.status, self.message, self.code, self.param, self.retry_after, self.where)

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body, in OpenAI's format."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> Mapping[str, str]:
        found = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def _made_again(
    status: int, message: str, code: str | None, param: str | None, retry_after: int, where: str
) -> ServiceError:
    return ServiceError(status, message, code=code, param=param, retry_after=retry_after, where=where)


def service_error(error: BaseException) -> ServiceError:
    """Convert any exception into a `ServiceError`.

    A failure of the server itself is described to the client in general words only.
    """
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
    kind = type(error).__name__
    return ServiceError(500, f"an unexpected {kind} in the server", code="internal", where=place_of(error))
