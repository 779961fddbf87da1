"""Several answers to one request: begun together, merged as they come, and closed in any case."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress

from fastapi import Request

from ..backend import Backend
from ..errors import ServiceError
from ..metrics import Metrics
from ..responses import ResponseChunk
from ..schema import ChatRequest, Details, Usage

Source = AsyncIterator[ResponseChunk]
_SEEDS = 1 << 64
IGNORED = "x-ignored-parameters"  # the header that names the fields without an effect


async def begin(backend: Backend, body: ChatRequest, tenant: str, client: str) -> Answers:
    """Begin all answers of a chat request.

    Raises:
        ServiceError: The request cannot be answered; none of its answers goes on.
    """
    most = backend.settings.max_client_requests
    if (body.n or 1) > most:
        raise ServiceError(400, f"at most {most} answers can be asked for", param="n")
    found = Answers([])
    try:
        for i in range(body.n or 1):
            found.sources.append(await backend.chat(_numbered(body, i), tenant, client))
    except BaseException:
        await found.aclose()
        raise
    return found


def _numbered(body: ChatRequest, index: int) -> ChatRequest:
    """Return the request for one answer; a seed is another one for each."""
    if body.n is None:
        return body
    seed = body.seed
    if seed is not None:
        seed = (seed + index + _SEEDS // 2) % _SEEDS - _SEEDS // 2
    return body.model_copy(update={"n": None, "seed": seed})


async def counted(
    answers: Answers, metrics: Metrics, request: Request, first: float
) -> AsyncIterator[tuple[int, ResponseChunk]]:
    """Yield the chunks of all answers and update the metrics.

    Args:
        answers: The answers.
        metrics: The metrics.
        request: The request, whose facts for the log are filled in.
        first: The time at which the request arrived.
    """
    begun = False
    usages: dict[int, Usage] = {}
    try:
        async for index, chunk in answers.merged():
            if not begun:
                metrics.first_token.observe(time.perf_counter() - first)
            begun = True
            if chunk.usage is not None:
                usages[index] = chunk.usage
            yield index, chunk
        _count(metrics, request, summed(usages))
    finally:
        await answers.aclose()


class Answers:
    """The answers to one request.

    Args:
        sources: The chunks of each answer.
    """

    def __init__(self, sources: Sequence[Source]):
        self.sources = list(sources)

    async def merged(self) -> AsyncIterator[tuple[int, ResponseChunk]]:
        """Yield the chunks of all answers as they come, each with the number of its answer."""
        if len(self.sources) == 1:
            async for chunk in self.sources[0]:
                yield 0, chunk
            return
        queue: asyncio.Queue[tuple[int, ResponseChunk | BaseException | None]] = asyncio.Queue()

        async def pump(index: int, source: Source) -> None:
            last: BaseException | None = None
            try:
                async for chunk in source:
                    queue.put_nowait((index, chunk))
            except Exception as error:
                last = error
            queue.put_nowait((index, last))

        pumps = [asyncio.ensure_future(pump(i, source)) for i, source in enumerate(self.sources)]
        try:
            left = len(pumps)
            while left:
                index, event = await queue.get()
                if isinstance(event, BaseException):
                    raise event
                if event is None:
                    left -= 1
                else:
                    yield index, event
        finally:
            for one in pumps:
                one.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def aclose(self) -> None:
        """End all answers."""
        for source in self.sources:
            with suppress(Exception):
                await source.aclose()  # type: ignore[attr-defined]


def summed(usages: Mapping[int, Usage]) -> Usage:
    """Return the token counts of a request: its prompt counts once, as in the first answer, and all of its answers."""
    if not usages:
        return Usage()
    first = usages[min(usages)]
    if len(usages) == 1:
        return first
    said = sum(one.completion_tokens for one in usages.values())
    return Usage(
        prompt_tokens=first.prompt_tokens,
        completion_tokens=said,
        total_tokens=first.prompt_tokens + said,
        prompt_tokens_details=Details(cached_tokens=first.prompt_tokens_details.cached_tokens),
    )


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
