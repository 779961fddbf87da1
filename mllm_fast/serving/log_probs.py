"""The log-probabilities of an answer in OpenAI's format."""

from __future__ import annotations

from typing import Any

from ..runtime.token_bytes import TokenBytes
from .requests import TokenEvent

_SPACES = b" \t\n\r\f\v"


class LogProbs:
    """The log-probabilities of an answer in OpenAI's format; the bytes of all entries, joined, are the answer's.

    Args:
        token_bytes: The bytes of a token.
    """

    def __init__(self, token_bytes: TokenBytes):
        self._bytes = token_bytes
        self._waiting: list[tuple[TokenEvent, bytes, bool]] = []
        self._begun = False
        self._left = 0  # bytes that were sent and belong to no entry yet

    def add(self, said: TokenEvent) -> None:
        """Add a token of the answer."""
        first = not self._begun
        content = self._stripped(self._bytes(said.token), first)
        self._begun = self._begun or bool(content)
        self._waiting.append((said, content, first))

    def sent(self, text: str, last: bool = False) -> tuple[dict[str, Any], ...]:
        """Return the entries that a piece of the answer completes.

        Args:
            text: The piece.
            last: Whether the answer ends with it: tokens behind its end have no entry.
        """
        self._left += len(text.encode("utf-8", "replace"))
        found = []
        while self._waiting and (last or len(self._waiting[0][1]) <= self._left):
            said, content, first = self._waiting.pop(0)
            if content and not self._left:
                continue
            content = content[: self._left]
            self._left -= len(content)
            top = [_entry(self._stripped(self._bytes(token), first), value) for token, value in said.top]
            found.append(_entry(content, said.log_prob) | {"top_logprobs": top})
        return tuple(found)

    def _stripped(self, content: bytes, first: bool) -> bytes:
        return content.lstrip(_SPACES) if first else content


def _entry(content: bytes, value: float) -> dict[str, Any]:
    return {"token": content.decode("utf-8", "replace"), "logprob": max(value, -9999.0), "bytes": list(content)}
