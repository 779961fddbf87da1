"""Reading prompts between decoding passes, in pieces that take no longer than a pass."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from ..runtime.prefill import Prefill, PrefillInPieces
from .context_builder import ContextBuilder
from .requests import Generation

if TYPE_CHECKING:
    from ..vlm import VLM

_SHARE = 0.6  # of a decoding pass that a piece may take: a token then comes after at most twice the time
_FIRST, _LEAST = 32, 8  # rows of a piece before anything was measured, and of the smallest one


class Reading(NamedTuple):
    """A prompt that is being read.

    Attributes:
        owner: Whose prompt it is.
        pieces: What reads it.
    """

    owner: Generation | ContextBuilder
    pieces: PrefillInPieces

    @classmethod
    def of(cls, vlm: VLM, owner: Generation | ContextBuilder) -> Reading:
        """Begin to read the prompt of a generation with an image of its own, or of a context."""
        if isinstance(owner, ContextBuilder):
            return cls(owner, owner.begin())
        assert owner.layout is not None
        inputs, owner.inputs = owner.inputs, None
        return cls(owner, PrefillInPieces(vlm, inputs, owner.layout))


class Pace:
    """Says how many rows of a prompt are read between two decoding passes, by how long both took."""

    def __init__(self) -> None:
        self._began = 0.0
        self._pass = 0.0  # seconds of the last decoding pass
        self._row = 0.0  # seconds of a row in the last piece

    def begin(self) -> None:
        """Note the begin of a decoding pass."""
        self._began = time.perf_counter()

    def end(self) -> None:
        """Note the end of a decoding pass."""
        self._pass = time.perf_counter() - self._began

    @property
    def rows(self) -> int:
        """How many rows the next piece has."""
        if not self._pass or not self._row:
            return _FIRST
        return max(_LEAST, int(_SHARE * self._pass / self._row))

    def read(self, pieces: PrefillInPieces, alone: bool) -> Prefill | None:
        """Read a prompt to its end if nobody waits for a token, else the next piece of it."""
        if alone:
            return pieces.read()
        rows, began = self.rows, time.perf_counter()
        begins = not pieces.begun
        found = pieces.read(rows)
        if not begins and found is None:  # the first piece is the vision tower, the last one may be short
            self._row = (time.perf_counter() - began) / rows
        return found
