"""Several answers to one request: begun together, merged as they come, and closed in any case."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

from ..backend import Backend
from ..responses import ResponseChunk
from ..schema import ChatRequest, Details, Usage

Source = AsyncIterator[ResponseChunk]
_SEEDS = 1 << 64


async def begin(backend: Backend, body: ChatRequest, tenant: str, client: str) -> Answers:
    """Begin all answers of a chat request.

    Raises:
        ServiceError: The request cannot be answered; none of its answers goes on.
    """
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


def summed(usages: Sequence[Usage]) -> Usage:
    """Return the token counts of a request: its prompt counts once, and all of its answers."""
    if not usages:
        return Usage()
    said = sum(one.completion_tokens for one in usages)
    first = usages[0]
    return Usage(
        prompt_tokens=first.prompt_tokens,
        completion_tokens=said,
        total_tokens=first.prompt_tokens + said,
        prompt_tokens_details=Details(cached_tokens=first.prompt_tokens_details.cached_tokens),
    )
