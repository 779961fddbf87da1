"""Tokens to text while they come: characters of several tokens, words to stop at, spaces at both ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Words:
    """The text of one answer. What `push` and `finish` return, one after another, is the whole text without spaces
    around it, up to the first of `stop`. `stopped`: whether one of these was said."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self.ids: list[int] = []
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = [one for one in stop if one]
        self._from = self._read = 0  # of the ids: where decoding begins, and what of them was turned into text
        self._held = ""  # not sent yet: it may be the beginning of a stop word, or the end
        self._begun = False

    def push(self, token: int) -> str:
        """Take a token; the text to be sent now."""
        if self.stopped:
            return ""
        self.ids.append(token)
        # decoded with the tokens before it, since spaces hang on them
        before = self._decoded(self.ids[self._from : self._read])
        now = self._decoded(self.ids[self._from :])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self._from, self._read = self._read, len(self.ids)
        return self._send(now[len(before) :])

    def finish(self) -> str:
        """No more tokens come; the rest of the text."""
        if self.stopped:
            return ""
        before = self._decoded(self.ids[self._from : self._read])
        rest = self._held + self._decoded(self.ids[self._from :])[len(before) :]
        self._held = ""
        return (rest if self._begun else rest.lstrip()).rstrip()

    def _send(self, more: str) -> str:
        text = self._held + more
        if not self._begun:
            text = text.lstrip()
        found = [place for one in self._stop if (place := text.find(one)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)].rstrip()
        keep = len(text) - len(text.rstrip())
        for one in self._stop:
            keep = max(keep, next((n for n in range(min(len(one) - 1, len(text)), 0, -1) if text.endswith(one[:n])), 0))
        ready, self._held = text[: len(text) - keep], text[len(text) - keep :]
        tail = len(ready) - len(ready.rstrip())  # spaces before the beginning of a stop word
        if tail:
            ready, self._held = ready[:-tail], ready[-tail:] + self._held
        self._begun = self._begun or bool(ready)
        return ready

    def _decoded(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""
