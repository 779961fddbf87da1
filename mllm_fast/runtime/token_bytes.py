"""The text and bytes of single tokens, from the vocabulary, so that they join to the answer."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_PIECES = {"ByteFallback", "Metaspace", "Replace"}  # decoders of vocabularies that write a space as U+2581
_SHOWN = "mllm_fast.bytes"  # an error handler of codecs: bytes that are no character are written as such


class TokenBytes:
    """The bytes that each token adds to a text.

    Args:
        tokenizer: The model's tokenizer. Bytes are found for those that the `tokenizers` library runs.
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
        self._joined = not self._letters and not self._kinds & _PIECES
        self._known = decoder is not None or hasattr(tokenizer, "backend_tokenizer")

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
        if self._kinds & _PIECES:
            found = _BYTE.fullmatch(piece)
            return bytes([int(found[1], 16)]) if found else piece.replace("\u2581", " ").encode()
        if self._prefix is not None and piece.startswith(self._prefix):
            return piece.removeprefix(self._prefix).encode()
        return b" " + piece.encode()  # words that are joined with spaces

    def text(self, token: int) -> str:
        """Return a token's text by itself: spaces as they are, and bytes of an incomplete character as "<0xE4>".

        A special token is its name.
        """
        if token in self._special or not self._known:
            return str(self._tokenizer.decode([token]))
        return self(token).decode("utf-8", _SHOWN).removeprefix(" " if self._joined else "")


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


def _as_hex(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "".join(f"<0x{one:02X}>" for one in error.object[error.start : error.end]), error.end


codecs.register_error(_SHOWN, _as_hex)
