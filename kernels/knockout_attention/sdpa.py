"""Knockout attention by torch's scaled_dot_product_attention, for processors where it is the faster one."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from . import reference


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor | None,
    table: Tensor | None,
    start: Tensor | None,
    scale: float,
    causal: bool = True,
) -> Tensor:
    """Compute the output of `reference.attention`. The mask is stored, [B, rows, N] of bool; the scores are torch's.

    Log-sum-exp, attention mass, soft cap and sinks are beyond it.
    """
    seen = reference.visible(query.shape[2], key.shape[2], segments, table, start, causal)[:, None]
    grouped = query.shape[1] != key.shape[1]
    out = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale, enable_gqa=grouped)
    if segments is not None or start is not None:  # without them each row sees itself
        out = out.masked_fill(~seen.any(-1, keepdim=True), 0)
    return out.transpose(1, 2).contiguous().transpose(1, 2)  # the strides of every backend
