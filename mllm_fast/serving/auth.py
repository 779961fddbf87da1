"""Bearer keys: who may ask, and whose contexts are whose."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from ..core.errors import InputError

VARIABLE = "MLLM_FAST_API_KEYS"
_SHORTEST = 16


class ApiKeys:
    """ApiKeys that are accepted; without any, everybody is, and all share their contexts. Only digests are held."""

    def __init__(self, keys: Iterable[str] = ()):
        self._digests = []
        for key in keys:
            if len(key) < _SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
                raise InputError(f"an API key has {_SHORTEST} or more printable ASCII characters without spaces")
            self._digests.append(_digest(key))

    @classmethod
    def find(cls, path: Path | None = None) -> ApiKeys:
        """From a file, a key a line (# begins a comment), and from the variable MLLM_FAST_API_KEYS (commas between
        them)."""
        lines = os.environ.get(VARIABLE, "").split(",")
        if path is not None:
            try:
                lines += path.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"{path}: the keys cannot be read ({type(error).__name__})") from None
        found = [line.partition("#")[0].strip() for line in lines]
        keys = [one for one in found if one]
        if path is not None and not keys:
            raise InputError(f"{path}: there is no key in it; write one a line")
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def tenant(self, key: str | None) -> str | None:
        """Whose contexts a key opens, a text that does not tell the key; None if it is not accepted."""
        if not self._digests:
            return ""
        given = _digest(key or "")
        # all are compared, each in constant time: how long it takes tells nothing
        accepted = [hmac.compare_digest(given, one) for one in self._digests]
        return given if any(accepted) else None


def _digest(key: str) -> str:
    return hashlib.sha256(b"mllm-fast key " + key.encode("utf-8", "surrogateescape")).hexdigest()
