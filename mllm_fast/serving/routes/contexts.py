"""Contexts: images that are read once and stored, and that questions then name by id."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from ..schema import ContextInfo, ContextRequest
from .state import State, Tenant

router = APIRouter(prefix="/v1/contexts")


@router.post("", summary="Read images and keep what matters of them", status_code=201)
async def create(body: ContextRequest, state: State, tenant: Tenant) -> ContextInfo:
    return await state.backend.create(body, tenant)


@router.get("", summary="The ids of your contexts")
async def contexts(state: State, tenant: Tenant) -> dict[str, Any]:
    found = await state.backend.contexts(tenant)
    return {"object": "list", "data": [{"id": one, "object": "context"} for one in found]}


@router.get("/{identity}", summary="A context")
async def context(
    identity: str,
    state: State,
    tenant: Tenant,
    kept: Annotated[bool, Query(description="With the image tokens that each layer keeps.")] = False,
) -> ContextInfo:
    return await state.backend.context(identity, tenant, kept)


@router.delete("/{identity}", summary="Forget a context")
async def delete(identity: str, state: State, tenant: Tenant) -> dict[str, Any]:
    await state.backend.delete(identity, tenant)
    return {"id": identity, "object": "context.deleted", "deleted": True}
