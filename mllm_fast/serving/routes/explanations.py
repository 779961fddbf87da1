"""Explanations: files that show which image patches and attention heads led to each word of an answer."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from ..schema import ExplanationRequest
from .connected import while_connected
from .state import Client, State, Tenant

_KINDS = {
    "json": "application/json",
    "png": "image/png",
    "html": "text/html",
    "safetensors": "application/octet-stream",
}

router = APIRouter()


@router.post(
    "/v1/explanations",
    summary="Which patches and heads made the model say it",
    response_class=Response,
    responses={
        200: {
            "description": "The explanation, in the format that was asked for.",
            "content": {kind: {} for kind in _KINDS.values()},
        }
    },
)
async def explain(body: ExplanationRequest, request: Request, state: State, tenant: Tenant, client: Client) -> Response:
    made = await while_connected(request, state.backend.explain(body, tenant, client))
    return Response(made, media_type=_KINDS[body.format])
