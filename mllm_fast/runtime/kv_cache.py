"""The name of the KV cache in transformers: `cache` since 5.24, `past_key_values` before."""

from __future__ import annotations

from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def cache_of(output: Any) -> Any:
    """Return the cache from the output of a model or of `generate`."""
    return output[CACHE]
