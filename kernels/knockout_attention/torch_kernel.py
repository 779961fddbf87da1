"""Knockout attention in plain torch, one block of rows at a time, for dtypes and devices without a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import wide_type
from . import reference

_BLOCK_ELEMENTS = 1 << 24  # elements of a block [B, H, rows, N], 64 MiB of float32


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor | None,
    table: Tensor | None,
    start: Tensor | None,
    scale: float,
    lse: bool,
    mass: bool | Tensor,
    causal: bool = True,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute `reference.attention` in float32 or wider, without repeating the key heads of grouped heads."""
    batch, heads, rows, width = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    wide = wide_type(query.dtype)
    output = query.new_empty(batch, rows, heads, width).transpose(1, 2)
    total = query.new_empty(batch, heads, rows, dtype=wide) if lse else None
    weight = None
    if mass is not False:
        chosen = query.new_ones(batch, rows, dtype=wide) if mass is True else mass.to(wide)
        weight = chosen / chosen.sum(-1, keepdim=True).clamp_min(1)
    share = query.new_zeros(batch, heads, keys, dtype=wide) if mass is not False else None
    key, value = key.to(wide)[:, :, None], value.to(wide)[:, :, None]
    grouped = query.unflatten(1, (kv_heads, -1))
    step = max(1, _BLOCK_ELEMENTS // max(1, batch * heads * keys))
    for first in range(0, rows, step):
        stop = min(first + step, rows)
        last = keys - rows + stop if causal else keys  # no row of the block sees a later key
        ids = None if segments is None else segments[:, :last]
        seen = reference.visible(stop - first, last, ids, table, start, causal).to(query.device)
        seen = seen[:, None, None]
        scores = grouped[:, :, :, first:stop].to(wide) @ key[..., :last, :].mT * scale
        scores = reference.capped(scores, softcap).masked_fill(~seen, -torch.inf)
        alpha = reference.weights(scores.flatten(1, 2), sinks).view_as(scores).masked_fill(~seen, 0)
        output[:, :, first:stop] = (alpha @ value[..., :last, :]).flatten(1, 2).to(query.dtype)
        if total is not None:
            total[:, :, first:stop] = reference.log_sum_exp(scores.flatten(1, 2), sinks)
        if share is not None and weight is not None:
            share[..., :last] += (weight[:, None, None, None, first:stop] @ alpha)[..., 0, :].flatten(1, 2)
    return output, total, share
