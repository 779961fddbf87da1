"""The text and bytes of single tokens, from the vocabulary, so that they join to the answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from .requests import TokenEvent

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACES = b" \t\n\r\f\v"


class TokenBytes:
    """The bytes that each token adds to a text.

    Args:
        tokenizer: The model's tokenizer, one that the `tokenizers` library runs.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._added = {int(i): str(token) for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        state = None if decoder is None else json.loads(decoder.__getstate__())
        self._kinds = set(_kinds(state))
        self._prefix = next((one["prefix"] for one in _parts(state) if one.get("type") == "WordPiece"), None)
        self._letters = _byte_letters() if "ByteLevel" in self._kinds else {}

    def __call__(self, token: int) -> bytes:
        """Return the bytes of a token; a special one has none, since answers are without them."""
        if token in self._special:
            return b""
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if self._letters:
            return bytes(self._letters[one] for one in piece if one in self._letters)
        if self._kinds & {"ByteFallback", "Metaspace", "Replace"}:
            found = _BYTE.fullmatch(piece)
            return bytes([int(found[1], 16)]) if found else piece.replace("\u2581", " ").encode()
        if self._prefix is not None and piece.startswith(self._prefix):
            return piece.removeprefix(self._prefix).encode()
        return b" " + piece.encode()  # words that are joined with spaces


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


def _parts(state: Any) -> Iterator[dict[str, Any]]:
    if isinstance(state, dict):
        yield state
        for value in state.values():
            yield from _parts(value)
    elif isinstance(state, list):
        for value in state:
            yield from _parts(value)


def _kinds(state: Any) -> Iterator[str]:
    return (one["type"] for one in _parts(state) if isinstance(one.get("type"), str))


def _byte_letters() -> dict[str, int]:
    """Return the byte of each letter of a byte-level vocabulary: printable bytes as they are, others from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [one for one in range(256) if one not in plain]
    return {chr(one): one for one in plain} | {chr(256 + i): one for i, one in enumerate(others)}
