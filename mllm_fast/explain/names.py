"""How a map is called: what `method` and `heads` of `Explanation.heatmap` name, in words."""

from __future__ import annotations

from typing import Any

DEFAULT = "logprob"  # method


def map_name(method: str, heads: Any = 10) -> str:
    """A map in words, as a verdict or a column names it."""
    if method != DEFAULT:
        return f"map {method!r}"
    if isinstance(heads, int):
        return f"log-probability map of the {heads} best heads"
    if heads == "all":
        return "log-probability map of all heads"
    named = ", ".join(f"{layer}.{head}" for layer, head in heads[:3])
    return f"log-probability map of {'head' if len(heads) == 1 else 'heads'} {named}{', ...' if len(heads) > 3 else ''}"
