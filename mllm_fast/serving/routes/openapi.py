"""Error handlers, and the description of errors in the OpenAPI document."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..errors import ServiceError
from ..schema import BRANCH

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": words,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    for status, words in {
        400: "The request cannot be served.",
        401: "The key is not accepted.",
        404: "There is no such model or context.",
        408: "The body did not come in time.",
        413: "The body is too large.",
        429: "Too many requests wait; see Retry-After.",
        500: "The server failed.",
        503: "The server is stopping.",
        504: "The answer took too long.",
    }.items()
}


def handle_errors(app: FastAPI) -> None:
    """Register handlers that answer every error in OpenAI's format."""

    @app.exception_handler(ServiceError)
    async def refused(request: Request, error: ServiceError) -> Response:
        note_error(request, error)
        return _answered(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _answered(_plain(error))

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        found = ServiceError(error.status_code, str(error.detail))
        headers = dict(error.headers or {})
        if error.status_code == 405:
            told = next((value for name, value in headers.items() if name.lower() == "allow"), "")
            methods = _allowed(request) | {one.strip() for one in told.split(",")} - {""}
            headers = {"Allow": ", ".join(sorted(methods))}
        return JSONResponse(found.body, found.status, headers)


def _allowed(request: Request) -> set[str]:
    """Return the methods of all routes of a request's path; Starlette names those of the first one."""
    document = request.app.openapi()
    found: set[str] = set()
    for path, operations in document["paths"].items():
        pattern = re.sub(r"\\\{[^/]*?:path\\\}|\\\{[^/]*?\\\}", "[^/]+", re.escape(path))
        if re.fullmatch(pattern, request.url.path):
            found |= {method.upper() for method in operations}
    return found


def note_error(request: Request, error: ServiceError) -> None:
    """Record for the log where the server itself failed."""
    if error.where:
        request.state.facts["error"] = error.where


def _answered(error: ServiceError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


def _plain(error: RequestValidationError) -> ServiceError:
    """Convert a validation error to one line, without the data that was sent, which may be an image."""
    found = error.errors()
    first = found[0]
    where = _field([part for part in first["loc"][1:] if not str(part).startswith(BRANCH)])[:200]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    words = f"{where or 'the body'}: {first['msg']}{more}"
    return ServiceError(400, words[:1000], param=where or None)


def _field(parts: Sequence[str | int]) -> str:
    """Return the path of a field as OpenAI writes it, such as "messages[0].content[1].text"."""
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def describe_errors(app: FastAPI) -> None:
    """Describe the errors in the OpenAPI document as the server sends them."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = made()
            text = {"type": ["string", "null"]}
            document["components"]["schemas"]["Error"] = {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type"],
                        "properties": {
                            "message": {"type": "string"},
                            "type": {"type": "string"},
                            "param": text,
                            "code": text,
                        },
                    }
                },
            }
            for path in document["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                document["components"]["schemas"].pop(name, None)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
