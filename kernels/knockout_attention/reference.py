"""The definition of `knockout_attention` in plain torch, which stores every score.

It runs in any dtype. In float64 it is the reference of the tests.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible(
    rows: int, keys: int, segments: Tensor | None, table: Tensor | None, start: Tensor | None, causal: bool = True
) -> Tensor:
    """Return which keys each of the last `rows` positions sees, bool [B or 1, rows, keys]."""
    device = next((t.device for t in (segments, start) if t is not None), None)
    key = torch.arange(keys, device=device)
    if causal:
        seen = (key <= key[keys - rows :, None])[None]
    else:
        seen = torch.ones(1, rows, keys, dtype=torch.bool, device=device)
    if start is not None:
        seen = seen & (key >= start[:, None, None])
    if segments is not None and table is not None:
        seen = seen & open_pairs(segments[:, keys - rows :], segments, table)
    return seen


def open_pairs(rows: Tensor, keys: Tensor, table: Tensor) -> Tensor:
    """Return which keys the segments let each row see, bool [B, rows, keys].

    Args:
        rows: Segment id of each row, [B, rows].
        keys: Segment id of each key, [B, keys].
        table: int32 [32]; see `segment_table`.
    """
    return table.long()[rows.long()[:, :, None]] >> keys.long()[:, None, :] & 1 == 0


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
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute `mllm_fast.kernels.knockout_attention`, with the same arguments and result, in the operands' dtype."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    seen = visible(query.shape[2], key.shape[2], segments, table, start, causal).to(query.device)[:, None]
    scores = (query @ key.mT * scale).masked_fill(~seen, -torch.inf)
    alpha = torch.softmax(scores, -1).masked_fill(~seen, 0)  # zeros, not NaN, for a row that sees no key
    total = torch.logsumexp(scores, -1) if lse else None
    return alpha @ value, total, mean_over_rows(alpha, mass)


def mean_over_rows(alpha: Tensor, mass: bool | Tensor) -> Tensor | None:
    """Return the mean of the attention weights over the chosen rows.

    Args:
        alpha: Attention weights, [B, H, R, N].
        mass: The chosen rows, bool [B, R]; True for all rows, False for no mean.

    Returns:
        The mean, [B, H, N], or None if `mass` is False.
    """
    if mass is False:
        return None
    chosen = alpha.new_ones(1, alpha.shape[2]) if mass is True else mass.to(alpha.dtype)
    weight = chosen / chosen.sum(-1, keepdim=True).clamp_min(1)
    return (weight[:, None, None, :] @ alpha)[:, :, 0]
