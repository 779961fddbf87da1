"""Routes for the served model, health checks and metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from ..errors import ServiceError
from ..metrics import CONTENT_TYPE
from .state import State, Tenant

router = APIRouter()


@router.get("/v1/models", summary="The model that is served")
async def models(state: State, tenant: Tenant) -> dict[str, Any]:
    return {"object": "list", "data": [_entry(state)]}


@router.get("/v1/models/{name:path}", summary="One model")
async def model(name: str, state: State, tenant: Tenant) -> dict[str, Any]:
    if name != state.backend.name:
        served = state.backend.name
        raise ServiceError(404, f"the model here is {served!r}", param="model", code="model_not_found")
    return _entry(state)


def _entry(state: State) -> dict[str, Any]:
    return {"id": state.backend.name, "object": "model", "created": state.began, "owned_by": "mllm-fast"}


@router.get("/health", summary="Whether the server lives", response_class=Response, include_in_schema=False)
@router.get("/healthz", summary="Whether the server lives", response_class=Response)
async def healthz(state: State) -> Response:
    there = state.probes.alive()
    return Response("ok\n" if there else "the engine has stopped\n", 200 if there else 503, media_type="text/plain")


@router.get("/readyz", summary="Whether requests are taken", response_class=Response)
async def readyz(state: State) -> Response:
    there = state.probes.ready()
    return Response("ready\n" if there else "not ready\n", 200 if there else 503, media_type="text/plain")


@router.get("/metrics", summary="For Prometheus", response_class=Response)
async def measured(state: State) -> Response:
    return Response(state.metrics.text(), headers={"Content-Type": CONTENT_TYPE})
