"""OpenAI's Responses interface, as far as a model that answers questions about images has use for it.

A request becomes a chat request. Of earlier answers the texts are remembered, but no images, so `previous_response_id`
is refused: send the earlier messages.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter, Request, Response

from ..errors import ServiceError, service_error
from ..response_schema import RESPONSE_IGNORED, ResponseRequest, chat_request
from ..responses import ResponseChunk
from ..schema import ignored
from .answers import IGNORED, begin, counted
from .connected import while_connected
from .events import EventStream, event, json_response
from .openapi import note_error
from .state import Client, State, Tenant

router = APIRouter()


@router.post(
    "/v1/responses",
    summary="Answer a conversation about images, as OpenAI's Responses",
    response_model=None,
    responses={
        200: {
            "description": 'The response; with "stream" its events.',
            "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
        }
    },
)
async def respond(body: ResponseRequest, request: Request, state: State, tenant: Tenant, client: Client) -> Response:
    first = time.perf_counter()
    asked = chat_request(body, lambda identity: state.replies.find(tenant, identity))
    answers = await while_connected(request, begin(state.backend, asked, tenant, client))
    chunks = counted(answers, state.metrics, request, first)
    made = _Made(body, request.state.id, state.backend.name, lambda one, text: state.replies.keep(tenant, one, text))
    unused = ignored(body, RESPONSE_IGNORED)
    headers = {IGNORED: unused} if unused else {}
    if not body.stream:

        async def whole() -> dict[str, Any]:
            async for _, chunk in chunks:
                made.add(chunk)
            made.keep()
            return made.response(made.status)

        try:
            return json_response(await while_connected(request, whole()), headers)
        finally:
            await answers.aclose()
    return EventStream(_events(request, made, chunks), answers, state.backend.settings.time_limit, headers)


class _Made:
    """A response in the making.

    Args:
        body: The request.
        identity: The id by which the server's log names the request.
        model: The name of the model.
        keep: Called with the id and the text of the answer, unless the request is not to be stored.
    """

    def __init__(self, body: ResponseRequest, identity: str, model: str, keep: Callable[[str, str], None]):
        self.body, self.model, self._keep = body, model, keep
        self.identity, self.message = f"resp_{identity}", f"msg_{identity}"
        self.created = int(time.time())
        self.text = ""
        self.last = ResponseChunk()

    def add(self, chunk: ResponseChunk) -> None:
        self.text += chunk.text
        self.last = chunk

    def keep(self) -> None:
        if self.body.store is not False:
            self._keep(self.message, self.text)

    @property
    def status(self) -> str:
        return "incomplete" if self.last.finish == "length" else "completed"

    def part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}

    def _format(self) -> dict[str, Any]:
        wanted = None if self.body.text is None else self.body.text.format
        return {"type": "text"} if wanted is None else wanted.model_dump(by_alias=True, exclude_none=True)

    def item(self, status: str) -> dict[str, Any]:
        content = [] if status == "in_progress" else [self.part()]
        return {"id": self.message, "type": "message", "status": status, "role": "assistant", "content": content}

    def response(self, status: str, error: ServiceError | None = None) -> dict[str, Any]:
        body, usage = self.body, self.last.usage
        ended = status in ("completed", "incomplete")
        return {
            "id": self.identity,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None if error is None else {"code": error.code or "server_error", "message": error.message},
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self.model,
            "output": [self.item(status)] if ended else [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": body.store is not False,
            "temperature": body.temperature or 0.0,
            "text": {"format": self._format()},
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None
            if usage is None
            else {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.prompt_tokens_details.cached_tokens},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.total_tokens,
            },
            "metadata": body.metadata or {},
        }


async def _events(
    request: Request, made: _Made, chunks: AsyncIterator[tuple[int, ResponseChunk]]
) -> AsyncIterator[bytes]:
    number = -1

    def tell(kind: str, **content: Any) -> bytes:
        nonlocal number
        number += 1
        return event({"type": kind, "sequence_number": number, **content}, kind)

    place = {"item_id": made.message, "output_index": 0, "content_index": 0}
    try:
        yield tell("response.created", response=made.response("in_progress"))
        yield tell("response.in_progress", response=made.response("in_progress"))
        yield tell("response.output_item.added", output_index=0, item=made.item("in_progress"))
        yield tell("response.content_part.added", **place, part=made.part())
        async for _, chunk in chunks:
            made.add(chunk)
            if chunk.text:
                yield tell("response.output_text.delta", **place, delta=chunk.text, logprobs=[])
        made.keep()
        yield tell("response.output_text.done", **place, text=made.text, logprobs=[])
        yield tell("response.content_part.done", **place, part=made.part())
        yield tell("response.output_item.done", output_index=0, item=made.item(made.status))
        yield tell(f"response.{made.status}", response=made.response(made.status))
    except Exception as error:  # the status was sent already, so the error is sent as an event
        found = service_error(error)
        note_error(request, found)
        yield tell("response.failed", response=made.response("failed", found))
    finally:
        await chunks.aclose()  # type: ignore[attr-defined]
