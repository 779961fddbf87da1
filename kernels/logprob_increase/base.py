"""What the increase needs of the residual vectors themselves, and the loop over groups of the kernels that take
one operand at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .operators import Operators
from .unembedding import Unembedding


class Base:
    """The logits at each of B residual vectors.

    lean: a, the change of the logits by the norm's scale, [B, V]. raw: logits before the cap, [B, V]. cap: the soft
    cap or None. log_probs: [B, V]. tokens: the explained tokens, int64 [B].
    """

    def __init__(self, residual, tokens: Tensor, unembedding: Unembedding, norm: str, final, scale: Tensor):
        centre = mean(residual if norm == "own" else final.to(residual.dtype), unembedding)
        self.lean = unembedding.times((residual - centre).T).T.contiguous()
        raw = scale[:, None] * self.lean
        offset = unembedding.offset(residual.dtype)
        self.raw = raw if offset is None else raw + offset
        self.cap = unembedding.softcap
        logits = self.raw if self.cap is None else self.cap * torch.tanh(self.raw / self.cap)
        self.log_probs = torch.log_softmax(logits, -1)
        self.tokens = tokens


def mean(x: Tensor, unembedding: Unembedding) -> Tensor:
    """What the final norm takes off x: its mean, or nothing."""
    if unembedding.kind == "rms":
        return x.new_zeros(())
    return x.mean(-1, keepdim=True)


def increase(
    log_sum_exp: Callable[..., Tensor],
    base: Base,
    writes: Tensor,
    operands: Tensor | Operators,
    shift: Tensor | None,
    source: Tensor,
) -> Tensor:
    """S [G, R] of scaled writes [G, R, k] to the residual vectors `source` [G], by a kernel with the contract of
    torch_kernel.log_sum_exp; `operands` is one for all groups, [V, k], or has one for each."""
    if isinstance(operands, Tensor):
        return _one_operand(log_sum_exp, base, writes, operands, shift, source)
    out = writes.new_empty(writes.shape[:2])
    for g in range(len(out)):
        one = slice(g, g + 1)
        lift = None if shift is None else shift[one]
        out[one] = _one_operand(log_sum_exp, base, writes[one], operands[g], lift, source[one])
    return out


def _one_operand(log_sum_exp, base: Base, writes, operand: Tensor, shift: Tensor | None, source: Tensor) -> Tensor:
    lean = None if shift is None else base.lean[source]
    raw = None if base.cap is None else base.raw[source]
    tokens = base.tokens[source]
    total = log_sum_exp(writes, operand, base.log_probs[source], lean, shift, raw, base.cap)
    explained = (writes @ operand[tokens].to(writes.dtype)[..., None])[..., 0]
    if shift is not None:
        explained = explained + shift * lean.gather(1, tokens[:, None])  # type: ignore[union-attr]
    if base.cap is not None:
        before = raw.gather(1, tokens[:, None]) / base.cap  # type: ignore[union-attr]
        explained = base.cap * (torch.tanh(before + explained / base.cap) - torch.tanh(before))
    return explained - total
