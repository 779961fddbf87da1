"""Work for a client that may leave: it is given up when the client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request

from ..errors import ServiceError

Result = TypeVar("Result")


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Await some work and return its result, but cancel it if the client disconnects.

    Raises:
        ServiceError: 499, the client went away.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    left = True
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ServiceError(499, "the client went away")
        left = False
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        result, _ = await asyncio.gather(working, watching, return_exceptions=True)
        if left and hasattr(result, "aclose"):  # an answer that came as the client left
            await result.aclose()
