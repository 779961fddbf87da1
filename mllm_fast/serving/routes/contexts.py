"""Contexts: images that are read once and stored, and that questions then name by id."""

from __future__ import annotations

from bisect import bisect_right
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from ..schema import ContextInfo, ContextRequest
from .connected import while_connected
from .state import Client, State, Tenant

router = APIRouter(prefix="/v1/contexts")


@router.post("", summary="Read images and keep what matters of them", status_code=201)
async def create(body: ContextRequest, request: Request, state: State, tenant: Tenant, client: Client) -> ContextInfo:
    return await while_connected(request, state.backend.create(body, tenant, client))


@router.get("", summary="The ids of your contexts")
async def contexts(
    state: State,
    tenant: Tenant,
    client: Client,
    limit: Annotated[int, Query(ge=1, le=10_000, description="How many ids are sent.")] = 1000,
    after: Annotated[str, Query(max_length=200, description="Send those behind this id.")] = "",
) -> dict[str, Any]:
    found = await state.backend.contexts(tenant, client)  # sorted
    begin = bisect_right(found, after)
    page = found[begin : begin + limit]
    more = begin + limit < len(found)
    return {"object": "list", "data": [{"id": one, "object": "context"} for one in page], "has_more": more}


@router.get("/{identity}", summary="A context")
async def context(
    identity: str,
    state: State,
    tenant: Tenant,
    client: Client,
    kept: Annotated[bool, Query(description="With the image tokens that each layer keeps.")] = False,
) -> ContextInfo:
    return await state.backend.context(identity, tenant, kept, client)


@router.delete("/{identity}", summary="Forget a context")
async def delete(identity: str, state: State, tenant: Tenant, client: Client) -> dict[str, Any]:
    await state.backend.delete(identity, tenant, client)
    return {"id": identity, "object": "context.deleted", "deleted": True}
