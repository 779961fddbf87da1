"""What stands before every route: bodies that are too large or too slow, answers to what went wrong, logs, counts."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .errors import ServiceError, service_error
from .logs import Log
from .metrics import Metrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Receive, Send], Awaitable[None]]

_BODY_SECONDS = 60.0


class RequestGuardMiddleware:
    """ASGI middleware. It knows nothing of what the routes do.

    Args:
        app: what it stands before. max_body: bytes of a request's body; `body_seconds`: how long it may take to come.
    """

    def __init__(self, app: App, max_body: int, log: Log, metrics: Metrics, body_seconds: float = _BODY_SECONDS):
        self._app, self._max_body, self._body_seconds = app, max_body, body_seconds
        self._log, self._metrics = log, metrics

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0
        refused: list[ServiceError] = []
        facts: dict[str, Any] = {}
        scope.setdefault("state", {})["facts"] = facts
        identity = uuid.uuid4().hex

        async def answer(message: Message) -> None:
            nonlocal status
            if refused and not status:  # whoever read the body may have made another error of it
                raise refused[0]
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", identity.encode())]
            await send(message)

        try:
            self._check_length(scope)
            await self._app(scope, self._bounded(receive, refused), answer)
        except Exception as error:
            found = service_error(refused[0] if refused else error)
            if found.where:
                facts["error"] = found.where
            if status:  # the answer was begun: all that is left is to end it
                raise
            refused.clear()
            await _send_error(found, answer)
        finally:
            seconds = time.perf_counter() - began
            # of a page that is mounted, the parts do not matter
            route = scope.get("root_path") or getattr(scope.get("route"), "path", None) or "other"
            self._metrics.requests.labels(route, str(status)).observe(seconds)
            if not (scope.get("root_path") and status < 400):
                self._log(
                    "request",
                    id=identity,
                    method=scope["method"] if len(scope["method"]) < 10 else "other",
                    route=route,
                    status=status,
                    ms=round(1000 * seconds, 1),
                    **facts,
                )

    def _check_length(self, scope: Any) -> None:
        for name, value in scope["headers"]:
            if name == b"content-length" and int(value) > self._max_body:
                raise self._too_large()

    def _bounded(self, receive: Receive, refused: list[ServiceError]) -> Receive:
        """The body's parts, counted, and not waited for forever; why it is not read on stands in `refused`."""
        total, done = 0, False
        until = time.monotonic() + self._body_seconds

        async def part() -> Message:
            nonlocal total, done
            if done:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.01, until - time.monotonic()))
            except TimeoutError:
                refused.append(ServiceError(408, f"the body did not come within {self._body_seconds:g} s"))
                raise refused[0] from None
            if message["type"] == "http.request":
                total += len(message.get("body", b""))
                done = not message.get("more_body", False)
                if total > self._max_body:
                    refused.append(self._too_large())
                    raise refused[0]
            return message

        return part

    def _too_large(self) -> ServiceError:
        return ServiceError(413, f"a request has at most {self._max_body:,} bytes; send a smaller image")


async def _send_error(error: ServiceError, send: Send) -> None:
    body = json.dumps(error.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.status in (408, 413):  # the rest of the body is not read
        headers.append((b"connection", b"close"))
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
