"""The HTTP interface: OpenAI's chat completions, contexts, explanations, health and metrics."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Annotated, Any, Protocol

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from .. import __version__
from .auth import ApiKeys
from .errors import ServiceError, service_error
from .logs import Log
from .metrics import CONTENT_TYPE, Metrics
from .middleware import RequestGuardMiddleware
from .responses import ResponseChunk
from .schema import ChatRequest, ContextInfo, ContextRequest, ExplanationRequest, Usage
from .settings import Settings

_KINDS = {
    "json": "application/json",
    "png": "image/png",
    "html": "text/html",
    "safetensors": "application/octet-stream",
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": words,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    for status, words in {
        400: "The request cannot be served.",
        401: "The key is not accepted.",
        404: "There is no such model or context.",
        408: "The body did not come in time.",
        413: "The body is too large.",
        429: "Too many requests wait; see Retry-After.",
        500: "The server failed.",
        503: "The server is stopping.",
        504: "The answer took too long.",
    }.items()
}


class Backend(Protocol):
    """What answers the requests; see `service.Service`."""

    name: str
    settings: Settings

    async def chat(self, request: ChatRequest, scope: str) -> AsyncIterator[ResponseChunk]: ...

    async def create(self, request: ContextRequest, scope: str) -> ContextInfo: ...

    async def context(self, identity: str, scope: str, kept: bool) -> ContextInfo: ...

    async def contexts(self, scope: str) -> list[str]: ...

    async def delete(self, identity: str, scope: str) -> None: ...

    async def explain(self, request: ExplanationRequest, scope: str) -> bytes: ...


_bearer = HTTPBearer(auto_error=False, description="A key of the server's, where it has any.")


async def scope_of(
    request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)] = None
) -> str:
    """Whose contexts a request may use."""
    scope = request.app.state.keys.scope(None if given is None else given.credentials)
    if scope is None:
        raise ServiceError(401, "this key is not accepted; send 'Authorization: Bearer KEY'", code="invalid_api_key")
    if scope:
        request.state.facts["client"] = scope[:8]
    return scope


Scoped = Annotated[str, Depends(scope_of)]


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
    """The application. `ready`: whether requests are taken; `start`, `stop`: of the backend, with the application's."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if start is not None:
            await start()
        yield
        if stop is not None:
            stop()

    app = FastAPI(title="mllm-fast", version=__version__, lifespan=lifespan, responses=_ERRORS, redirect_slashes=False)
    app.state.keys = keys
    app.add_middleware(RequestGuardMiddleware, max_body=backend.settings.max_body, log=log, metrics=metrics)
    began = int(time.time())

    @app.exception_handler(ServiceError)
    async def refused(request: Request, error: ServiceError) -> Response:
        _note(request, error)
        return _answered(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _answered(_plain(error))

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        found = ServiceError(error.status_code, str(error.detail))
        return JSONResponse(found.body, found.status, error.headers)

    @app.post(
        "/v1/chat/completions",
        summary="Answer a conversation about pictures",
        response_model=None,
        responses={
            200: {
                "description": 'The answer; with "stream" its pieces, as server-sent events.',
                "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
            }
        },
    )
    async def chat(body: ChatRequest, request: Request, scope: Scoped) -> Response:
        identity, created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        first = time.perf_counter()
        pieces = await backend.chat(body, scope)
        head = {"id": identity, "created": created, "model": backend.name}

        async def counted() -> AsyncIterator[ResponseChunk]:
            begun = False
            try:
                async for piece in pieces:
                    if not begun:
                        metrics.first_token.observe(time.perf_counter() - first)
                    begun = True
                    if piece.usage is not None:
                        _count(metrics, request, piece.usage)
                    yield piece
            finally:
                await pieces.aclose()  # type: ignore[attr-defined]

        if not body.stream:
            return JSONResponse(head | await _while_connected(request, _whole(counted(), bool(body.logprobs))))
        usage = body.stream_options is not None and body.stream_options.include_usage
        events = _events(request, head, counted(), bool(body.logprobs), usage)
        return _Events(events, backend.settings.time_limit)

    @app.get("/v1/models", summary="The model that is served")
    async def models(scope: Scoped) -> dict[str, Any]:
        entry = {"id": backend.name, "object": "model", "created": began, "owned_by": "mllm-fast"}
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{name:path}", summary="One model")
    async def model(name: str, scope: Scoped) -> dict[str, Any]:
        if name != backend.name:
            raise ServiceError(404, f"the model here is {backend.name!r}", param="model", code="model_not_found")
        return {"id": name, "object": "model", "created": began, "owned_by": "mllm-fast"}

    @app.post("/v1/contexts", summary="Read pictures and keep what matters of them", status_code=201)
    async def create(body: ContextRequest, scope: Scoped) -> ContextInfo:
        return await backend.create(body, scope)

    @app.get("/v1/contexts", summary="The ids of your contexts")
    async def contexts(scope: Scoped) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": one, "object": "context"} for one in await backend.contexts(scope)]}

    @app.get("/v1/contexts/{identity}", summary="A context")
    async def context(
        identity: str,
        scope: Scoped,
        kept: Annotated[bool, Query(description="With the image tokens that each layer keeps.")] = False,
    ) -> ContextInfo:
        return await backend.context(identity, scope, kept)

    @app.delete("/v1/contexts/{identity}", summary="Forget a context")
    async def delete(identity: str, scope: Scoped) -> dict[str, Any]:
        await backend.delete(identity, scope)
        return {"id": identity, "object": "context.deleted", "deleted": True}

    @app.post(
        "/v1/explanations",
        summary="Which patches and heads made the model say it",
        response_class=Response,
        responses={
            200: {
                "description": "The explanation, in the format that was asked for.",
                "content": {kind: {} for kind in _KINDS.values()},
            }
        },
    )
    async def explain(body: ExplanationRequest, scope: Scoped) -> Response:
        return Response(await backend.explain(body, scope), media_type=_KINDS[body.format])

    @app.get("/healthz", summary="Whether the server lives", response_class=Response)
    async def healthz() -> Response:
        return Response("ok\n", media_type="text/plain")

    @app.get("/readyz", summary="Whether requests are taken", response_class=Response)
    async def readyz() -> Response:
        there = ready()
        return Response("ready\n" if there else "not ready\n", 200 if there else 503, media_type="text/plain")

    @app.get("/metrics", summary="For Prometheus", response_class=Response)
    async def measured() -> Response:
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    _describe_errors(app)
    return app


class _Events(StreamingResponse):
    """Server-sent events, given up where a reader takes longer than an answer may take."""

    def __init__(self, pieces: AsyncIterator[bytes], seconds: float):
        super().__init__(pieces, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.wait_for(super().__call__(scope, receive, send), 2 * self._seconds)
        except TimeoutError:
            raise ConnectionAbortedError("the reader of a stream was too slow") from None


async def _while_connected(request: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    """What some work gives, given up where nobody waits for it any more."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ServiceError(499, "the client went away")
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _whole(pieces: AsyncIterator[ResponseChunk], logprobs: bool) -> dict[str, Any]:
    text: list[str] = []
    logs: list[dict[str, Any]] = []
    last = ResponseChunk()
    async for piece in pieces:
        text.append(piece.text)
        logs += piece.logprobs
        last = piece
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": "".join(text), "refusal": None},
        "finish_reason": last.finish,
        "logprobs": {"content": logs, "refusal": None} if logprobs else None,
    }
    usage = None if last.usage is None else last.usage.model_dump()
    return {"object": "chat.completion", "choices": [choice], "usage": usage} | _context(last)


def _context(piece: ResponseChunk) -> dict[str, Any]:
    return {} if piece.context is None else {"context": piece.context.model_dump(exclude_none=True)}


async def _events(
    request: Request, head: dict[str, Any], pieces: AsyncIterator[ResponseChunk], logprobs: bool, with_usage: bool
) -> AsyncIterator[bytes]:
    head = head | {"object": "chat.completion.chunk"}

    def event(delta: dict[str, Any], piece: ResponseChunk = ResponseChunk()) -> bytes:  # noqa: B008
        logs = {"content": list(piece.logprobs), "refusal": None} if logprobs and piece.logprobs else None
        choice = {"index": 0, "delta": delta, "finish_reason": piece.finish, "logprobs": logs}
        return _event(head | {"choices": [choice]} | ({"usage": None} if with_usage else {}) | _context(piece))

    try:
        yield event({"role": "assistant", "content": ""})
        async for piece in pieces:
            if piece.text or piece.logprobs:
                yield event({"content": piece.text}, ResponseChunk(piece.text, piece.logprobs))
            if piece.finish is not None:
                yield event({}, ResponseChunk(finish=piece.finish, context=piece.context))
                if with_usage and piece.usage is not None:
                    yield _event(head | {"choices": [], "usage": piece.usage.model_dump()})
        yield b"data: [DONE]\n\n"
    except Exception as error:  # the status was sent: an error is an event
        found = service_error(error)
        _note(request, found)
        yield _event(found.body)
    finally:
        await pieces.aclose()  # type: ignore[attr-defined]


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


def _count(metrics: Metrics, request: Request, usage: Usage) -> None:
    cached = usage.prompt_tokens_details.cached_tokens
    metrics.prompt_tokens.inc(usage.prompt_tokens)
    metrics.cached_tokens.inc(cached)
    metrics.answer_tokens.inc(usage.completion_tokens)
    request.state.facts |= {
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": cached,
        "answer_tokens": usage.completion_tokens,
    }


def _note(request: Request, error: ServiceError) -> None:
    """For the log: where an error of the server's own came from."""
    if error.where:
        request.state.facts["error"] = error.where


def _answered(error: ServiceError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


def _plain(error: RequestValidationError) -> ServiceError:
    """What pydantic found, in a line; never what was sent, which may be a picture."""
    found = error.errors()
    first = found[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")[:200]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    words = f"{where or 'the body'}: {first['msg']}{more}"
    return ServiceError(400, words[:1000], param=where or None)


def _describe_errors(app: FastAPI) -> None:
    """Errors in the OpenAPI document are those that are sent."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = made()
            text = {"type": ["string", "null"]}
            document["components"]["schemas"]["Error"] = {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type"],
                        "properties": {
                            "message": {"type": "string"},
                            "type": {"type": "string"},
                            "param": text,
                            "code": text,
                        },
                    }
                },
            }
            for path in document["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                document["components"]["schemas"].pop(name, None)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
