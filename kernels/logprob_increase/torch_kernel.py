"""The log-sum-exp in plain torch, a block of the vocabulary at a time: for machines without a compiler,
for dtypes and devices that have no kernel of their own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import Base
from .operators import Operators

_BLOCK_ELEMENTS = 1 << 20  # of [rows, block of words], so 4 MiB of float32 at a time


def increase(
    base: Base,
    values: Tensor,
    gain: Tensor | None,
    operands: Tensor | Operators,
    shift: Tensor | None,
    source: Tensor | None,
) -> Tensor:
    """S [G, R] of writes [G, R, k] of any type, times `gain` [k], to the residual vectors `source` [G], None for one
    after another; `operands` is one for all groups, [V, k], or has one for each. shift [G, R]: the change of the norm's
    scale, None for frozen statistics."""
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
