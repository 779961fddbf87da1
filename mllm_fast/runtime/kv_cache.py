"""What transformers calls a model's KV cache: `cache` since 5.24, `past_key_values` before."""

from __future__ import annotations

from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def cache_of(output: Any) -> Any:
    """The cache in what a model, or `generate`, returned."""
    return output[CACHE]
