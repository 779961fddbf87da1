"""The log-sum-exp in plain torch, a block of the vocabulary at a time: for machines without a compiler,
for dtypes and devices that have no kernel of their own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import Base
from .base import increase as increase_by_group
from .operators import Operators

_BLOCK_ELEMENTS = 1 << 20  # of [rows, block of words], so 4 MiB of float32 at a time


def increase(base: Base, writes: Tensor, operands: Tensor | Operators, shift: Tensor | None, source: Tensor) -> Tensor:
    """See `base.increase`."""
    return increase_by_group(log_sum_exp, base, writes, operands, shift, source)


def log_sum_exp(
    writes: Tensor,
    operand: Tensor,
    base: Tensor,
    lean: Tensor | None,
    shift: Tensor | None,
    raw: Tensor | None,
    cap: float | None,
) -> Tensor:
    """log sum_v exp(base[g, v] + d), d = writes[g, r] . operand[v] + shift[g, r] lean[g, v]; with a cap,
    d counts as cap (tanh((raw + d) / cap) - tanh(raw / cap)).

    writes [G, R, k]; operand [V, k]; base, lean, raw [G, V]; shift [G, R]. Returns [G, R].
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
