"""API keys, sent as bearer tokens: they decide who may use the server and which contexts belong to whom."""

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
    """The API keys that the server accepts.

    Without any key, everybody is accepted and all clients share their contexts. Only digests of the keys are stored.

    Args:
        keys: The accepted keys, each of at least 16 printable ASCII characters without spaces.

    Raises:
        InputError: A key is too short or has other characters.
    """

    def __init__(self, keys: Iterable[str] = ()):
        self._digests = []
        for key in keys:
            if len(key) < _SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
                raise InputError(f"an API key has {_SHORTEST} or more printable ASCII characters without spaces")
            self._digests.append(_digest(key))

    @classmethod
    def find(cls, path: Path | None = None) -> ApiKeys:
        """Read the keys from a file and from the environment variable MLLM_FAST_API_KEYS.

        Args:
            path: A file with one key per line; # begins a comment. In the variable, commas separate the keys.

        Raises:
            InputError: The file cannot be read, or a file is given and neither it nor the variable has a key.
        """
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
        """Return the tenant that a key belongs to.

        Returns:
            A text that does not reveal the key; "" if the server has no keys; None if the key is not accepted.
        """
        if not self._digests:
            return ""
        given = _digest(key or "")
        # every key is compared in constant time, so that the duration reveals nothing
        accepted = [hmac.compare_digest(given, one) for one in self._digests]
        return given if any(accepted) else None


def _digest(key: str) -> str:
    return hashlib.sha256(b"mllm-fast key " + key.encode("utf-8", "surrogateescape")).hexdigest()
