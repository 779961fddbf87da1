"""The definition of `weighted_values` in plain torch, for any dtype and device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import wide_type


def weighted_values(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    heads: Sequence[tuple[int, int]],
    count: int,
    scale: Sequence[float],
    seen: Sequence[Tensor | None],
) -> Tensor:
    """Compute `mllm_fast.kernels.weighted_values` with the same arguments; `seen` has one entry per layer."""
    wide = wide_type(query.dtype)
    out = query.new_empty(len(heads), count, query.shape[2], dtype=wide)
    for g, (layer, head) in enumerate(heads):
        shared = head // (query.shape[1] // len(keys[layer]))
        scores = keys[layer][shared, :count].to(wide) @ query[layer, head].to(wide) * scale[layer]
        mask = seen[layer]
        if mask is not None:
            scores = scores.masked_fill(~mask[:count].to(scores.device), -torch.inf)
        torch.mul(torch.softmax(scores, -1)[:, None], values[layer][shared, :count].to(wide), out=out[g])
    return out
