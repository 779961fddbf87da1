"""Chat completions in OpenAI's format, sent whole or as server-sent events."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response

from ..errors import service_error
from ..responses import ResponseChunk
from ..schema import CHAT_IGNORED, ChatRequest, Usage, ignored
from .answers import IGNORED, begin, counted, summed
from .connected import while_connected
from .events import EventStream, event, json_response
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
    identity, created = f"chatcmpl-{request.state.id}", int(time.time())
    first = time.perf_counter()
    head = {"id": identity, "created": created, "model": backend.name}
    unused = ignored(body, CHAT_IGNORED)
    headers = {IGNORED: unused} if unused else {}
    logprobs = bool(body.logprobs)
    if not body.stream:

        async def whole() -> dict[str, Any]:
            answers = await begin(backend, body, tenant, client)
            return await _whole(counted(answers, state.metrics, request, first), len(answers.sources), logprobs)

        return json_response(head | await while_connected(request, whole()), headers)
    answers = await while_connected(request, begin(backend, body, tenant, client))
    chunks = counted(answers, state.metrics, request, first)
    usage = body.stream_options is not None and body.stream_options.include_usage
    events = _events(request, head, chunks, len(answers.sources), logprobs, usage)
    return EventStream(events, answers, backend.settings.time_limit, headers)


async def _whole(chunks: AsyncIterator[tuple[int, ResponseChunk]], count: int, logprobs: bool) -> dict[str, Any]:
    text: list[list[str]] = [[] for _ in range(count)]
    logs: list[list[dict[str, Any]]] = [[] for _ in range(count)]
    last = [ResponseChunk() for _ in range(count)]
    async for index, chunk in chunks:
        text[index].append(chunk.text)
        logs[index] += chunk.logprobs
        last[index] = chunk
    choices: list[dict[str, Any]] = [
        {
            "index": i,
            "message": {"role": "assistant", "content": "".join(text[i]), "refusal": None, "annotations": []},
            "finish_reason": last[i].finish,
            "logprobs": {"content": logs[i], "refusal": None} if logprobs else None,
        }
        for i in range(count)
    ]
    usage = summed({i: one.usage for i, one in enumerate(last) if one.usage is not None}).model_dump()
    return {"object": "chat.completion", "choices": choices, "usage": usage} | _context(last[0])


def _context(chunk: ResponseChunk) -> dict[str, Any]:
    return {} if chunk.context is None else {"context": chunk.context.model_dump(exclude_none=True)}


async def _events(
    request: Request,
    head: dict[str, Any],
    chunks: AsyncIterator[tuple[int, ResponseChunk]],
    count: int,
    logprobs: bool,
    with_usage: bool,
) -> AsyncIterator[bytes]:
    head = head | {"object": "chat.completion.chunk"}

    def part(index: int, delta: dict[str, Any], chunk: ResponseChunk = ResponseChunk()) -> bytes:  # noqa: B008
        logs = {"content": list(chunk.logprobs), "refusal": None} if logprobs and chunk.logprobs else None
        choice = {"index": index, "delta": delta, "finish_reason": chunk.finish, "logprobs": logs}
        return event(head | {"choices": [choice]} | ({"usage": None} if with_usage else {}) | _context(chunk))

    usages: dict[int, Usage] = {}
    try:
        for index in range(count):
            yield part(index, {"role": "assistant", "content": ""})
        async for index, chunk in chunks:
            if chunk.text or chunk.logprobs:
                yield part(index, {"content": chunk.text}, ResponseChunk(chunk.text, chunk.logprobs))
            if chunk.finish is not None:
                yield part(index, {}, ResponseChunk(finish=chunk.finish, context=chunk.context))
            if chunk.usage is not None:
                usages[index] = chunk.usage
        if with_usage:
            yield event(head | {"choices": [], "usage": summed(usages).model_dump()})
        yield b"data: [DONE]\n\n"
    except Exception as error:  # the status was sent already, so the error is sent as an event
        found = service_error(error)
        note_error(request, found)
        yield event(found.body)
    finally:
        await chunks.aclose()  # type: ignore[attr-defined]
