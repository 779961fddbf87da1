"""The interface between the HTTP routes and the service that answers their requests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from .responses import ResponseChunk
from .schema import ChatRequest, ContextInfo, ContextRequest, ExplanationRequest
from .settings import Settings


class Backend(Protocol):
    """The methods that the HTTP routes call; `service.Service` documents them."""

    name: str
    settings: Settings

    async def chat(self, request: ChatRequest, tenant: str, client: str) -> AsyncIterator[ResponseChunk]: ...

    async def create(self, request: ContextRequest, tenant: str, client: str) -> ContextInfo: ...

    async def context(self, identity: str, tenant: str, kept: bool, client: str) -> ContextInfo: ...

    async def contexts(self, tenant: str, client: str) -> list[str]: ...

    async def delete(self, identity: str, tenant: str, client: str) -> None: ...

    async def explain(self, request: ExplanationRequest, tenant: str, client: str) -> bytes: ...
