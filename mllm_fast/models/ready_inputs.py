"""Inputs that were prepared ahead of their use, so that another thread than the model's pays for the processor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Prepared = tuple[Any, list[Any], list[int]]  # the processor's inputs, layouts and padding, as `Prompts.prepare` returns


class ReadyInputs:
    """Holds prepared inputs for one prompt about images, for as long as somebody needs them."""

    def __init__(self) -> None:
        self._held: dict[tuple[Any, ...], Prepared] = {}

    @contextmanager
    def holding(self, pictures: Sequence[Any], prompt: str, made: Prepared) -> Iterator[None]:
        """Let `Prompts.prepare` return these inputs inside the block, for the same image objects and prompt."""
        key = _key([pictures], [prompt])
        self._held[key] = made
        try:
            yield
        finally:
            self._held.pop(key, None)

    def has(self, picture: Any) -> bool:
        """Return whether this very image belongs to held inputs; it is loaded already, then."""
        # a copy, since another thread may add and remove inputs meanwhile
        return any(id(picture) in some for pictures, _ in list(self._held) for some in pictures)

    def find(self, pictures: Sequence[Sequence[Any]], prompts: Sequence[str]) -> Prepared | None:
        """Return held inputs, as copies that may be changed, or None."""
        found = self._held.get(_key(pictures, prompts)) if self._held else None
        if found is None:
            return None
        inputs, layouts, padding = found
        return type(inputs)(dict(inputs)), list(layouts), list(padding)


def _key(pictures: Sequence[Sequence[Any]], prompts: Sequence[str]) -> tuple[Any, ...]:
    return tuple(tuple(map(id, some)) for some in pictures), tuple(prompts)
