"""Answers as they are sent: whole as JSON, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from .answers import Answers


class EventStream(StreamingResponse):
    """A stream of server-sent events, cut off if the client reads too slowly.

    Args:
        chunks: The encoded events.
        answers: What they are made of; it is closed in any case.
        seconds: The time limit of an answer; the whole stream may take twice as long.
        headers: Further headers.
    """

    def __init__(self, chunks: AsyncIterator[bytes], answers: Answers, seconds: float, headers: Mapping[str, str]):
        super().__init__(
            chunks,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"} | dict(headers),
        )
        self._answers, self._seconds = answers, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.wait_for(super().__call__(scope, receive, send), 2 * self._seconds)
        except (TimeoutError, asyncio.TimeoutError):
            raise ConnectionAbortedError("the reader of a stream was too slow") from None
        finally:
            await self._answers.aclose()


def json_response(content: dict[str, Any], headers: Mapping[str, str]) -> Response:
    """Return an answer as a whole."""
    return Response(_encoded(content), media_type="application/json", headers=dict(headers))


def _encoded(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")  # a client may have sent half a character


def event(content: dict[str, Any], name: str | None = None) -> bytes:
    """Return one event.

    Args:
        content: The data.
        name: The name of the event; without one it has none.
    """
    data = b"data: " + _encoded(content) + b"\n\n"
    return data if name is None else b"event: " + name.encode() + b"\n" + data
