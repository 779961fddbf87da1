"""Middleware for all routes: it limits the size and duration of request bodies, answers errors, logs and counts."""

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
    """ASGI middleware that guards every request. It does not depend on the routes.

    Args:
        app: The application behind the middleware.
        max_body: The largest body of a request, in bytes.
        log: Writes one line for each request.
        metrics: Counts the requests.
        body_seconds: How many seconds a body may take to arrive.
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
            if refused and not status:  # the reader of the body may have turned it into another error
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
            if status:  # the answer has begun, so it can only be broken off
                raise
            refused.clear()
            await _send_error(found, answer)
        finally:
            seconds = time.perf_counter() - began
            # a mounted application counts as one route
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
        """Wrap `receive` with the limits of size and time, and record in `refused` why a body was not read further."""
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
    if error.status in (408, 413):  # the rest of the body stays unread
        headers.append((b"connection", b"close"))
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
