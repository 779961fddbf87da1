"""Explanations: files that show which image patches and attention heads led to each word of an answer."""

from __future__ import annotations

from fastapi import APIRouter, Response

from ..schema import ExplanationRequest
from .state import State, Tenant

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
async def explain(body: ExplanationRequest, state: State, tenant: Tenant) -> Response:
    return Response(await state.backend.explain(body, tenant), media_type=_KINDS[body.format])
