"""What the increase needs of the residual vectors themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from .unembedding import Unembedding


class Base:
    """The logits at each of B residual vectors.

    lean: a, the change of the logits by the norm's scale, [B, V]. raw: logits before the cap, [B, V]. cap: the soft
    cap or None. log_probs: [B, V]. tokens: the explained tokens, int64 [B].
    """

    def __init__(self, residual, tokens: Tensor, unembedding: Unembedding, norm: str, final, scale: Tensor):
        if unembedding.kind == "layer":
            residual = residual - (residual if norm == "own" else final.to(residual.dtype)).mean(-1, keepdim=True)
        self.lean = unembedding.times(residual.T).T.contiguous()
        raw = scale[:, None] * self.lean
        offset = unembedding.offset(residual.dtype)
        self.raw = raw if offset is None else raw + offset
        self.cap = unembedding.softcap
        logits = self.raw if self.cap is None else self.cap * torch.tanh(self.raw / self.cap)
        self.log_probs = torch.log_softmax(logits, -1)
        self.tokens = tokens

    def of(self, source: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """log_probs, lean, shift and raw of groups that write to the residual vectors `source` [G], as a kernel takes
        them."""
        lean = None if shift is None else self.lean[source]
        return self.log_probs[source], lean, shift, None if self.cap is None else self.raw[source]

    def explained(self, writes: Tensor, rows: Tensor, shift: Tensor | None, source: Tensor) -> Tensor:
        """The change of the explained tokens' logits [G, R] by scaled writes [G, R, k]; rows: the operands' rows of
        these tokens, [G, k]."""
        tokens = self.tokens[source]
        change = (writes @ rows.to(writes.dtype)[..., None])[..., 0]
        if shift is not None:
            change = change + shift * self.lean[source, tokens][:, None]
        if self.cap is not None:
            before = self.raw[source, tokens][:, None] / self.cap
            change = self.cap * (torch.tanh(before + change / self.cap) - torch.tanh(before))
        return change
