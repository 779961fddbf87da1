"""Middleware for all routes: it checks key and limits before a body is read, answers errors, logs and counts."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from .auth import ApiKeys
from .budgets import ByteBudget, Rate
from .connections import client_address
from .errors import ServiceError, service_error
from .logs import Log
from .metrics import Metrics
from .settings import Settings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Receive, Send], Awaitable[None]]

_BODY_SECONDS = 60.0
_LINGER_SECONDS = 5.0
# what may be asked without a key; everything below /ui has a login of its own
_OPEN = frozenset(
    ("/", "/health", "/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc")
)
_OPEN_BELOW = "/ui"
_STRUCTURE = (b",", b":", b"[", b"{")


class RequestGuardMiddleware:
    """ASGI middleware that guards every request. It does not depend on the routes.

    The key, the rate and the declared size are checked on the headers alone. A body is then read with a limit of its
    own, one for all bodies of a client and one for all bodies. The state of a request gets the tenant of its key
    ("tenant"), what its limits are counted by ("client"), facts for the log ("facts") and the id by which the log, the
    header x-request-id and the answer name it ("id").

    Args:
        app: The application behind the middleware.
        settings: The limits.
        keys: The API keys that are accepted.
        log: Writes one line for each request.
        metrics: Counts the requests.
        body_seconds: How many seconds a body may take to arrive.
    """

    def __init__(
        self,
        app: App,
        settings: Settings,
        keys: ApiKeys,
        log: Log,
        metrics: Metrics,
        body_seconds: float = _BODY_SECONDS,
    ):
        self._app, self._settings, self._keys, self._body_seconds = app, settings, keys, body_seconds
        self._log, self._metrics = log, metrics
        self._bodies = ByteBudget("bodies of requests", settings.max_bodies, settings.max_client_bodies)
        self._rate = Rate(settings.open_rate if keys else 0.0, 4 * max(1, int(settings.open_rate)))

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0
        refused: list[ServiceError] = []
        facts: dict[str, Any] = {}
        identity = uuid.uuid4().hex
        scope.setdefault("state", {}).update(facts=facts, id=identity)

        async def answer(message: Message) -> None:
            nonlocal status
            if refused and not status:  # the reader of the body may have turned it into another error
                raise refused[0]
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", identity.encode())]
            await send(message)

        body = _Body(receive, self._settings, self._bodies, self._body_seconds, refused)
        try:
            self._admit(scope, body)
            await self._app(scope, body.receive, answer)
        except Exception as error:
            found = service_error(refused[0] if refused else error)
            if found.where:
                facts["error"] = found.where
            if status:  # the answer has begun, so it can only be broken off
                if found.status >= 500 and found.where:
                    facts["broken_off"] = True
                raise _BrokenOffError from None
            refused.clear()
            await _send_error(found, answer, body)
        finally:
            body.close()
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

    def _admit(self, scope: Any, body: _Body) -> None:
        """Check what the headers tell: whose request it is, how often such come, and how long its body is."""
        headers = dict(scope["headers"])
        kind, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        tenant = self._keys.tenant(key.strip() if kind.lower() == "bearer" else None)
        address = client_address(scope.get("client"))
        body.client = tenant or address
        scope["state"] |= {"tenant": tenant, "client": body.client}
        if tenant:
            scope["state"]["facts"]["client"] = tenant[:8]
        else:
            self._rate.count(address)
        if tenant is None and not _is_open(scope["path"]):
            raise ServiceError(
                401, "this key is not accepted; send 'Authorization: Bearer KEY'", code="invalid_api_key"
            )
        length = headers.get(b"content-length", b"0")
        body.expects_continue = b"expect" in headers
        body.left = int(length) if length.isdigit() else 0
        if body.left > self._settings.max_body:
            raise body.too_large()


class _BrokenOffError(ConnectionAbortedError):
    """An answer that had begun cannot be finished; the log has the reason."""


class _Body:
    """The body of one request, read within the limits.

    Args:
        receive: The server's function.
        settings: The limits.
        budget: The budget of all bodies.
        seconds: How long the body may take to arrive.
        refused: Gets the error for which the body was not read further.
    """

    def __init__(
        self, receive: Receive, settings: Settings, budget: ByteBudget, seconds: float, refused: list[ServiceError]
    ):
        self._receive, self._settings, self._budget, self._refused = receive, settings, budget, refused
        self.client = ""
        self.left = 0  # what the headers tell of its length
        self.expects_continue = False
        self._seconds, self._until = seconds, time.monotonic() + seconds
        self._total = self._values = 0
        self.done = False

    async def receive(self) -> Message:
        """Receive like the server's function; the errors are `ServiceError`s."""
        if self.done:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.01, self._until - time.monotonic()))
        except (TimeoutError, asyncio.TimeoutError):
            raise self._refuse(ServiceError(408, f"the body did not come within {self._seconds:g} s")) from None
        if message["type"] == "http.request":
            self._take(message.get("body", b""))
            self.done = not message.get("more_body", False)
        return message

    def _take(self, part: bytes) -> None:
        try:
            self._budget.take(self.client, len(part))
        except ServiceError as error:
            raise self._refuse(error) from None
        self._total += len(part)
        if self._total > self._settings.max_body:
            raise self._refuse(self.too_large())
        # an upper limit of the values of a JSON document, before it is parsed; images have one comma each
        self._values += sum(map(part.count, _STRUCTURE))
        if self._values > self._settings.max_values:
            raise self._refuse(
                ServiceError(413, f"a request has at most {self._settings.max_values:,} commas, colons and brackets")
            )

    def _refuse(self, error: ServiceError) -> ServiceError:
        self._refused.append(error)
        return error

    def too_large(self) -> ServiceError:
        return ServiceError(413, f"a request has at most {self._settings.max_body:,} bytes; send a smaller image")

    async def discard(self) -> bool:
        """Read what still comes and keep nothing of it, so that the client gets to read the answer.

        Returns:
            Whether the whole body came, so that the connection can take another request.
        """
        if self.done:
            return True
        if self.expects_continue:  # the client waits for a word before it sends
            return False
        with suppress(TimeoutError, asyncio.TimeoutError):
            await asyncio.wait_for(self._discard(), _LINGER_SECONDS)
        return self.done

    async def _discard(self) -> None:
        read = 0
        while read <= self._settings.max_body:
            message = await self._receive()
            if message["type"] != "http.request":
                return
            read += len(message.get("body", b""))
            if not message.get("more_body", False):
                self.done = True
                return

    def close(self) -> None:
        """Give the body's bytes back to the budget."""
        self._budget.give(self.client, self._total)


def _is_open(path: str) -> bool:
    return path in _OPEN or path == _OPEN_BELOW or path.startswith(f"{_OPEN_BELOW}/")


async def _send_error(error: ServiceError, send: Send, body: _Body) -> None:
    content = json.dumps(error.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    whole = body.done or (not body.left and error.status not in (408, 413, 429))
    if not whole:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": content, "more_body": not whole})
    if not whole:
        await body.discard()
        await send({"type": "http.response.body", "body": b"", "more_body": False})
