"""Chat completions in OpenAI's format, sent whole or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from ..errors import service_error
from ..metrics import Metrics
from ..responses import ResponseChunk
from ..schema import ChatRequest, Usage
from .connected import while_connected
from .openapi import note_error
from .state import Client, State, Tenant

router = APIRouter()


@router.post(
    "/v1/chat/completions",
    summary="Answer a conversation about images",
    response_model=None,
    responses={
        200: {
            "description": 'The answer; with "stream" its pieces, as server-sent events.',
            "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
        }
    },
)
async def chat(body: ChatRequest, request: Request, state: State, tenant: Tenant, client: Client) -> Response:
    backend = state.backend
    identity, created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
    first = time.perf_counter()
    source = await while_connected(request, backend.chat(body, tenant, client))
    chunks = _counted(source, state.metrics, request, first)
    head = {"id": identity, "created": created, "model": backend.name}
    if not body.stream:
        return JSONResponse(head | await while_connected(request, _whole(chunks, bool(body.logprobs))))
    usage = body.stream_options is not None and body.stream_options.include_usage
    events = _events(request, head, chunks, bool(body.logprobs), usage)
    return _Events(events, source, backend.settings.time_limit)


async def _counted(
    chunks: AsyncIterator[ResponseChunk], metrics: Metrics, request: Request, first: float
) -> AsyncIterator[ResponseChunk]:
    """Yield the chunks and update the metrics. `first` is the time at which the request arrived."""
    begun = False
    try:
        async for chunk in chunks:
            if not begun:
                metrics.first_token.observe(time.perf_counter() - first)
            begun = True
            if chunk.usage is not None:
                _count(metrics, request, chunk.usage)
            yield chunk
    finally:
        await chunks.aclose()  # type: ignore[attr-defined]


class _Events(StreamingResponse):
    """A stream of server-sent events, cut off if the client reads too slowly.

    Args:
        chunks: The encoded events.
        source: What they are made of; it is closed in any case.
        seconds: The time limit of an answer; the whole stream may take twice as long.
    """

    def __init__(self, chunks: AsyncIterator[bytes], source: AsyncIterator[ResponseChunk], seconds: float):
        super().__init__(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._source, self._seconds = source, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.wait_for(super().__call__(scope, receive, send), 2 * self._seconds)
        except (TimeoutError, asyncio.TimeoutError):
            raise ConnectionAbortedError("the reader of a stream was too slow") from None
        finally:
            await self._source.aclose()  # type: ignore[attr-defined]


async def _whole(chunks: AsyncIterator[ResponseChunk], logprobs: bool) -> dict[str, Any]:
    text: list[str] = []
    logs: list[dict[str, Any]] = []
    last = ResponseChunk()
    async for chunk in chunks:
        text.append(chunk.text)
        logs += chunk.logprobs
        last = chunk
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": "".join(text), "refusal": None},
        "finish_reason": last.finish,
        "logprobs": {"content": logs, "refusal": None} if logprobs else None,
    }
    usage = None if last.usage is None else last.usage.model_dump()
    return {"object": "chat.completion", "choices": [choice], "usage": usage} | _context(last)


def _context(chunk: ResponseChunk) -> dict[str, Any]:
    return {} if chunk.context is None else {"context": chunk.context.model_dump(exclude_none=True)}


async def _events(
    request: Request, head: dict[str, Any], chunks: AsyncIterator[ResponseChunk], logprobs: bool, with_usage: bool
) -> AsyncIterator[bytes]:
    head = head | {"object": "chat.completion.chunk"}

    def event(delta: dict[str, Any], chunk: ResponseChunk = ResponseChunk()) -> bytes:  # noqa: B008
        logs = {"content": list(chunk.logprobs), "refusal": None} if logprobs and chunk.logprobs else None
        choice = {"index": 0, "delta": delta, "finish_reason": chunk.finish, "logprobs": logs}
        return _event(head | {"choices": [choice]} | ({"usage": None} if with_usage else {}) | _context(chunk))

    try:
        yield event({"role": "assistant", "content": ""})
        async for chunk in chunks:
            if chunk.text or chunk.logprobs:
                yield event({"content": chunk.text}, ResponseChunk(chunk.text, chunk.logprobs))
            if chunk.finish is not None:
                yield event({}, ResponseChunk(finish=chunk.finish, context=chunk.context))
                if with_usage and chunk.usage is not None:
                    yield _event(head | {"choices": [], "usage": chunk.usage.model_dump()})
        yield b"data: [DONE]\n\n"
    except Exception as error:  # the status was sent already, so the error is sent as an event
        found = service_error(error)
        note_error(request, found)
        yield _event(found.body)
    finally:
        await chunks.aclose()  # type: ignore[attr-defined]


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
