"""Answers that later requests name by their ids, as clients of OpenAI's Responses do."""

from __future__ import annotations

from collections import OrderedDict

from .errors import ServiceError

_MOST, _CHARACTERS = 10_000, 16_000_000


class Replies:
    """The latest answers of all tenants, in memory.

    Args:
        most: How many are kept.
        characters: How long they are together at most.
    """

    def __init__(self, most: int = _MOST, characters: int = _CHARACTERS):
        self._most, self._characters = most, characters
        self._held: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._length = 0

    def keep(self, tenant: str, identity: str, text: str) -> None:
        """Keep an answer of a tenant under its id; the oldest ones make room."""
        self._held[tenant, identity] = text
        self._length += len(text)
        while len(self._held) > self._most or self._length > self._characters:
            self._length -= len(self._held.popitem(last=False)[1])

    def find(self, tenant: str, identity: str) -> str:
        """Return an answer.

        Raises:
            ServiceError: The tenant has no such answer, or it was forgotten.
        """
        found = self._held.get((tenant, identity))
        if found is None:
            raise ServiceError(
                404, "there is no such item any more: send its message instead", param="input", code="item_not_found"
            )
        return found
