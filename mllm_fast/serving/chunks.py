"""Turn the engine's events into the chunks of a response."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from ..runtime.token_bytes import TokenBytes
from .detokenizer import AnswerDetokenizer
from .errors import service_error
from .log_probs import LogProbs
from .requests import FailureEvent, FinishEvent, Generation, PrefillEvent, TokenEvent
from .responses import ResponseChunk, info_of
from .schema import Details, Usage


class Closing(AsyncIterator[ResponseChunk]):
    """An iterator that calls a function once when it ends, even if it was closed before its first item.

    Args:
        source: The items, of an asynchronous generator.
        ended: The function.
    """

    def __init__(self, source: AsyncGenerator[ResponseChunk, None], ended: Callable[[], None]):
        self._source, self._ended = source, ended

    async def __anext__(self) -> ResponseChunk:
        try:
            return await self._source.__anext__()
        except BaseException:
            self._end()
            raise

    async def aclose(self) -> None:
        """End the iterator."""
        try:
            await self._source.aclose()
        finally:
            self._end()

    def _end(self) -> None:
        ended, self._ended = self._ended, lambda: None
        ended()


async def response_chunks(
    wanted: Generation,
    queue: asyncio.Queue[Any],
    words: AnswerDetokenizer,
    token_bytes: TokenBytes,
) -> AsyncGenerator[ResponseChunk, None]:
    """Yield the chunks of an answer, made from the engine's events.

    Args:
        wanted: The generation that the engine runs.
        queue: The queue that receives the engine's events.
        words: Turns the tokens into text and finds the stop words.
        token_bytes: The bytes of a token, for the log-probabilities.

    Raises:
        ServiceError: The engine reported a failure.
    """
    usage, info = Usage(), None
    logs = None if wanted.log_probs is None else LogProbs(token_bytes)
    while True:
        event = await queue.get()
        if isinstance(event, FailureEvent):
            raise service_error(event.error)
        if isinstance(event, PrefillEvent):
            usage.prompt_tokens = event.prompt_tokens
            usage.prompt_tokens_details = Details(cached_tokens=event.cached)
            info = None if event.context is None else info_of(wanted.key, event.context, brief=True)
            continue
        if isinstance(event, TokenEvent):
            usage.completion_tokens += 1
            if logs is not None:
                logs.add(event)
            text = words.push(event.token)
            if words.stopped:
                event = FinishEvent("stop")
            elif text:
                yield ResponseChunk(text, () if logs is None else logs.sent(text))
            if not words.stopped:
                continue
        else:
            text = words.finish()
        usage.total_tokens = usage.prompt_tokens + usage.completion_tokens
        yield ResponseChunk(text, () if logs is None else logs.sent(text, last=True), event.reason, usage, info)
        return
