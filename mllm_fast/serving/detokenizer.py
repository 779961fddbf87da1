"""Turn the tokens of an answer into the text that is sent: stripped, and cut at the first stop word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..runtime.detokenizer import Detokenizer


class AnswerDetokenizer(Detokenizer):
    """Turns tokens into text as they arrive.

    The texts that `push` and `finish` return form, joined together, the whole answer. It has no spaces around it and
    ends before the first stop word.

    Args:
        tokenizer: The model's tokenizer.
        stop: The stop words.

    Attributes:
        stopped: Whether a stop word was generated.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        super().__init__(tokenizer, skip_special_tokens=True)
        self.stopped = False
        self._stop = [one for one in stop if one]
        self._held = ""  # not sent yet: it may begin a stop word, or be spaces at the end
        self._begun = False

    def push(self, token: int) -> str:
        """Add a token, and return the text that can be sent now."""
        if self.stopped:
            return ""
        more = super().push(token)
        return self._send(more) if more else ""

    def finish(self) -> str:
        """Return the rest of the text, after the last token."""
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
        tail = len(ready) - len(ready.rstrip())  # spaces before a possible stop word
        if tail:
            ready, self._held = ready[:-tail], ready[-tail:] + self._held
        self._begun = self._begun or bool(ready)
        return ready
