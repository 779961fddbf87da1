"""Tokens to text while they come."""

from __future__ import annotations

from typing import Any


class Detokenizer:
    """The text of one answer, token by token: what `push` and `finish` return, one after another, is the whole text.

    A token is decoded with those before it, since spaces hang on them, but never with more than a few of them.

    Args:
        tokenizer: of the model. skip_special_tokens: leave out the tokens that are no text.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = False):
        self.ids: list[int] = []
        self._tokenizer = tokenizer
        self._options = {"skip_special_tokens": True} if skip_special_tokens else {}
        self._from = self._read = 0  # of the ids: where decoding begins, and what of them was turned into text

    def push(self, token: int) -> str:
        """Take a token; the text that it adds, empty while a character of several tokens is unfinished."""
        self.ids.append(token)
        before = self._decoded(self.ids[self._from : self._read])
        now = self._decoded(self.ids[self._from :])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        unread = self.ids[self._read :]
        self._from, self._read = self._read, len(self.ids)
        return now[len(before) :] if now.startswith(before) else self._decoded(unread)

    def finish(self) -> str:
        """No more tokens come; the text of an unfinished character."""
        before = self._decoded(self.ids[self._from : self._read])
        rest = self._decoded(self.ids[self._from :])[len(before) :]
        self._from = self._read = len(self.ids)
        return rest

    def _decoded(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, **self._options) if ids else ""


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """Each token's own text, spaces included: what decoding it adds. Bytes of an unfinished character belong to the
    token that finishes it."""
    words = Detokenizer(tokenizer)
    texts = [words.push(token) for token in ids]
    if texts:
        texts[-1] += words.finish()
    return texts
