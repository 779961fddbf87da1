"""Explanations whose scores are computed only as long as somebody waits for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Interruptible:
    """An explanation that calls a function before each access.

    Drawing and encoding ask an explanation for one map after another, so the function can end them by an exception.

    Args:
        explanation: The explanation.
        check: Called before each access.
    """

    def __init__(self, explanation: Any, check: Callable[[], None]):
        self._explanation, self._check = explanation, check

    def __getattr__(self, name: str) -> Any:
        self._check()
        return getattr(self._explanation, name)
