"""The increase in plain torch, one block of the vocabulary at a time.

It serves machines without a compiler, and dtypes and devices that have no kernel of their own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import Base
from .operators import Operators

_BLOCK_ELEMENTS = 1 << 20  # elements of a block [rows, words], 4 MiB of float32


def increase(
    base: Base,
    values: Tensor,
    gain: Tensor | None,
    operands: Tensor | Operators,
    shift: Tensor | None,
    source: Tensor | None,
) -> Tensor:
    """Compute the increase S of log p(token) by each write.

    Args:
        base: Residual vectors with their explained tokens and logits.
        values: Writes, [G, R, k], in any floating dtype.
        gain: Gain of the norm, [k], which multiplies the writes, or None.
        operands: One operand for all groups, [V, k], or one operator for each group.
        shift: Change of the norm's scale by each write, [G, R], or None for frozen statistics.
        source: Residual vector of each group, int64 [G], or None for 0, 1, 2, ...

    Returns:
        S, [G, R].
    """
    source = base.each(source)
    writes = base.scaled(values, gain, shift, source)
    if isinstance(operands, Tensor):
        total = log_sum_exp(writes, operands, *base.of(source, shift), base.cap)
        return base.explained(writes, operands[base.tokens[source]], shift, source) - total
    out = writes.new_empty(writes.shape[:2])
    for g in range(len(out)):
        one = slice(g, g + 1)
        lift = None if shift is None else shift[one]
        operand = operands[g]
        total = log_sum_exp(writes[one], operand, *base.of(source[one], lift), base.cap)
        out[one] = base.explained(writes[one], operand[base.tokens[source[one]]], lift, source[one]) - total
    return out


def log_sum_exp(
    writes: Tensor,
    operand: Tensor,
    base: Tensor,
    lean: Tensor | None,
    shift: Tensor | None,
    raw: Tensor | None,
    cap: float | None,
) -> Tensor:
    """Compute log sum_v exp(base[g, v] + d), d = writes[g, r] . operand[v] + shift[g, r] lean[g, v].

    With a cap, d is replaced by cap (tanh((raw + d) / cap) - tanh(raw / cap)).

    Args:
        writes: [G, R, k].
        operand: [V, k].
        base, lean, raw: [G, V].
        shift: [G, R].
        cap: The soft cap, or None.

    Returns:
        The log-sum-exp, [G, R].
    """
    groups, rows, _ = writes.shape
    total = writes.new_full((groups, rows), -math.inf)
    step = max(1, _BLOCK_ELEMENTS // max(1, groups * rows))
    for start in range(0, len(operand), step):
        words = slice(start, start + step)
        delta = writes @ operand[words].to(writes.dtype).T
        if lean is not None and shift is not None:
            delta += shift[..., None] * lean[:, None, words]
        if cap is not None and raw is not None:
            before = raw[:, None, words] / cap
            delta = cap * (torch.tanh(before + delta / cap) - torch.tanh(before))
        delta += base[:, None, words]
        total = torch.logaddexp(total, torch.logsumexp(delta, -1))
    return total
