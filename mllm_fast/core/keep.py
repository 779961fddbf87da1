"""How many image tokens are kept, as a text."""

from __future__ import annotations

from .errors import InputError


def parse_keep(keep: float | int | str) -> float | int:
    """Return the share, for "5%" or "0.05", or the count, for "29", that a text stands for.

    A number is returned as it is.

    Raises:
        InputError: The text is neither.
    """
    if not isinstance(keep, str):
        return keep
    text = keep
    try:
        if text.strip().endswith("%"):
            return float(text.strip()[:-1]) / 100
        return int(text) if text.strip().isdecimal() else float(text)
    except ValueError:
        raise InputError(f"keep is a share (0.05, 5%) or a count (29), got {text!r}") from None
