"""The text of an answer as it is sent: without spaces around it, up to the first word to stop at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..runtime.detokenizer import Detokenizer


class AnswerDetokenizer(Detokenizer):
    """What `push` and `finish` return, one after another, is the whole text without spaces around it, up to the first
    of `stop`. `stopped`: whether one of these was said."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        super().__init__(tokenizer, skip_special_tokens=True)
        self.stopped = False
        self._stop = [one for one in stop if one]
        self._held = ""  # not sent yet: it may be the beginning of a stop word, or the end
        self._begun = False

    def push(self, token: int) -> str:
        """Take a token; the text to be sent now."""
        if self.stopped:
            return ""
        more = super().push(token)
        return self._send(more) if more else ""

    def finish(self) -> str:
        """No more tokens come; the rest of the text."""
        if self.stopped:
            return ""
        rest, self._held = self._held + super().finish(), ""
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
