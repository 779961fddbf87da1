"""The KV cache of transformers: its name (`cache` since 5.24, `past_key_values` before), and its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..models.text_model import TextModel

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def cache_of(output: Any) -> Any:
    """Return the cache from the output of a model or of `generate`."""
    return output[CACHE]


def full_cache(text: TextModel) -> DynamicCache:
    """Return an empty cache that keeps every position, those outside a sliding window included.

    Sliding layers see what their masks let them see, and explanations read keys that have left the window.
    """
    cache = DynamicCache(config=text.config)
    cache.layers = [DynamicLayer() if getattr(layer, "is_sliding", False) else layer for layer in cache.layers]
    return cache


def last_position(position_ids: Tensor) -> int:
    """Return the largest position of the last token, from the position ids [B, N] or [axes, B, N] of a pass."""
    if position_ids.ndim == 3 and len(position_ids) == 4:  # the first row is only for masks, the others are the axes
        position_ids = position_ids[1:]
    return int(position_ids[..., -1].max())


def of_one_shape(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the keys or values of all sites, [Hkv, N, D] each, in one shape.

    Sites of the same shape are returned as they are. Otherwise each becomes [1, N, F], its heads side by side and zeros
    behind them.
    """
    if len({(len(one), one.shape[-1]) for one in tensors}) == 1:
        return list(tensors)
    size = max(len(one) * one.shape[-1] for one in tensors)
    flat = [one.transpose(0, 1).flatten(1) for one in tensors]
    return [pad(one, (0, size - one.shape[-1]))[None] for one in flat]


def of_own_shape(whole: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Return views of what `of_one_shape` made, stacked [S, ...], as [Hkv, N, D] a site; `shapes` are Hkv and D."""
    if len(set(shapes)) == 1:
        return list(whole)
    return [
        one[0, :, : heads * width].unflatten(1, (heads, width)).transpose(0, 1)
        for one, (heads, width) in zip(whole, shapes, strict=True)
    ]
