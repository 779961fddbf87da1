"""Results of the service: chunks of answers, and descriptions of contexts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..context.compress import ContextSizes
from ..context.store import tenant_digest
from .errors import ServiceError
from .schema import ContextInfo, Usage

if TYPE_CHECKING:
    from ..context.context import Context

CONTEXT_ID = re.compile(r"ctx-([0-9a-f]{64})")


@dataclass(frozen=True)
class ResponseChunk:
    """A part of an answer.

    Attributes:
        text: The new text.
        logprobs: The log-probabilities of its tokens, in OpenAI's format.
        finish: In the last chunk, why the answer ended: "stop" or "length".
        usage: In the last chunk, the token counts.
        context: In the last chunk, the context that was used, if any.
    """

    text: str = ""
    logprobs: tuple[dict[str, Any], ...] = ()
    finish: str | None = None
    usage: Usage | None = None
    context: ContextInfo | None = None


def key_of(identity: str, tenant: str) -> str:
    """Return the store's key of a context id.

    Raises:
        ServiceError: The id is not valid or belongs to another tenant. Both give the same error, so that a client
            cannot find out whether another tenant's context exists.
    """
    match = CONTEXT_ID.fullmatch(identity)
    if match is None or not match[1].endswith(tenant_digest(tenant)):
        raise no_context(identity)
    return match[1]


def no_context(identity: str) -> ServiceError:
    shown = identity if CONTEXT_ID.fullmatch(identity) else "of this name"
    return ServiceError(404, f"there is no context {shown}", code="context_not_found")


def info_of(key: str, context: Context | ContextSizes, kept: bool = False, brief: bool = False) -> ContextInfo:
    info = ContextInfo(
        id=f"ctx-{key}",
        tokens=context.num_tokens,
        prefix_tokens=context.prefix_length,
        bytes=context.nbytes,
        uncompressed_bytes=context.full_nbytes,
    )
    if brief or isinstance(context, ContextSizes):
        return info
    info.prompt, info.description = context.prompt, context.description
    info.keep, info.score = context.settings["keep"], context.settings["score"]
    info.budget = context.settings.get("budget", "all")
    info.images = [list(image.size) for image in context.layout.images]
    if kept:
        layers = [context.kept(layer) for layer in range(len(context.positions))]
        info.kept = [
            {"positions": one.positions.tolist(), "images": one.images.tolist(), "boxes": one.boxes.tolist()}
            for one in layers
        ]
    return info
