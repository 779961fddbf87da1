"""Replies of language models without what they put around the answer: reasoning, code fences and prose."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

_REASONING = re.compile(r"<(think|thinking|thought|reasoning|analysis)>.*?</\1>", re.DOTALL | re.IGNORECASE)
_ENDED = re.compile(r"^.*</(?:think|thinking|thought|reasoning|analysis)>", re.DOTALL | re.IGNORECASE)


def without_reasoning(text: str) -> str:
    """Return a reply without its blocks of reasoning; an opening mark may be missing, as some servers take it away."""
    return _ENDED.sub("", _REASONING.sub("", text)).strip()


def json_object(text: str, names: Collection[str]) -> dict[str, Any]:
    """Return the JSON object with the given names in a reply, whatever stands around it; the last one counts.

    Raises:
        ValueError: There is none.
    """
    decoder, found, at = json.JSONDecoder(), None, text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            value, end = None, at + 1
        if isinstance(value, dict) and set(value) == set(names):
            found = value
        elif isinstance(value, dict):
            end = at + 1  # it may lie in this one
        at = text.find("{", end)
    if found is None:
        raise ValueError(f"no JSON object of {', '.join(map(repr, names))}")
    return found
