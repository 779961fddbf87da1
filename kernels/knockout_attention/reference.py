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
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute `mllm_fast.kernels.knockout_attention`, with the same arguments and result, in the operands' dtype."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    seen = visible(query.shape[2], key.shape[2], segments, table, start, causal).to(query.device)[:, None]
    scores = capped(query @ key.mT * scale, softcap).masked_fill(~seen, -torch.inf)
    alpha = weights(scores, sinks).masked_fill(~seen, 0)  # zeros, not NaN, for a row that sees no key
    total = log_sum_exp(scores, sinks) if lse else None
    return alpha @ value, total, mean_over_rows(alpha, mass)


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Return scores under a soft cap, or as they are if it is None."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Return scores [B, H, R, N] with the score of each head's sink [H], if there are sinks, as one more key."""
    if sinks is None:
        return scores
    column = sinks.to(scores)[None, :, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], -1)


def weights(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Return the attention weights of scores [B, H, R, N], of which a head's sink takes its part."""
    return torch.softmax(with_sinks(scores, sinks), -1)[..., : scores.shape[-1]]


def log_sum_exp(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Return the log-sum-exp of scores [B, H, R, N] and of each head's sink, [B, H, R]."""
    return torch.logsumexp(with_sinks(scores, sinks), -1)


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
