"""Incremental decoding of tokens to text."""

from __future__ import annotations

from typing import Any

from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Turns the tokens of one answer into text, one token at a time.

    The texts that `push` and `finish` return, joined in order, are the whole text, as the tokenizer decodes it. A token
    is not decoded by itself, because its spaces and characters depend on those before it: the tokenizers library's own
    `DecodeStream` does it, and where a tokenizer is not one of that library, or changes spaces afterwards, the token is
    decoded together with a few tokens before it.

    Args:
        tokenizer: The tokenizer of the model.
        skip_special_tokens: Leave out the special tokens.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = False):
        self.ids: list[int] = []
        self._tokenizer = tokenizer
        self._options = {"skip_special_tokens": True} if skip_special_tokens else {}
        self._from = self._read = 0  # indices into ids: where decoding begins, and where unread tokens begin
        self._backend = None if _changes_spaces(tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)

    def push(self, token: int) -> str:
        """Add a token, and return the text that it adds.

        The text is empty while a character of several tokens is incomplete.
        """
        self.ids.append(token)
        if self._backend is not None:
            try:
                text = self._stream.step(self._backend, token)
            except Exception:  # the library raises nothing narrower where bytes make no character
                self._backend = None
            else:
                if text:
                    self._from, self._read = self._read, len(self.ids)
                return text or ""
        before = self._decoded(self.ids[self._from : self._read])
        now = self._decoded(self.ids[self._from :])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        unread = self.ids[self._read :]
        self._from, self._read = self._read, len(self.ids)
        return now[len(before) :] if now.startswith(before) else self._decoded(unread)

    def finish(self) -> str:
        """End the answer, and return the text of an incomplete character, if there is one."""
        before = self._decoded(self.ids[self._from : self._read])
        rest = self._decoded(self.ids[self._from :])[len(before) :]
        self._from = self._read = len(self.ids)
        return rest

    def _decoded(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, **self._options) if ids else ""


def _changes_spaces(tokenizer: Any) -> bool:
    """Whether transformers takes spaces before punctuation out of a decoded text; it never does so for BPE."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return (
        bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        and type(getattr(backend, "model", None)).__name__ != "BPE"
    )


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """Return the text that each token adds, spaces included.

    The bytes of a character that spans several tokens belong to the token that completes it.
    """
    words = Detokenizer(tokenizer)
    texts = [words.push(token) for token in ids]
    if texts:
        texts[-1] += words.finish()
    return texts
