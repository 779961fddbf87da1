"""What the increase needs of the residual vectors themselves."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from .unembedding import Unembedding


class Base:
    """The logits at each of B residual vectors: scale * lean + offset, before the cap.

    scale: of the norm, [B]. lean: the change of the logits by the norm's scale, [B, V]. offset: what depends on no
    residual vector, [V] or None. cap: the soft cap or None. tokens: the explained tokens, int64 [B].
    """

    def __init__(self, residual, tokens: Tensor, unembedding: Unembedding, norm: str, final, scale: Tensor):
        if unembedding.kind == "layer":
            residual = residual - (residual if norm == "own" else final.to(residual.dtype)).mean(-1, keepdim=True)
        self.scale = scale
        self.lean = unembedding.of_rows(residual)
        self.offset = unembedding.offset(residual.dtype)
        self.cap = unembedding.softcap
        self.tokens = tokens

    @cached_property
    def raw(self) -> Tensor:
        """Logits before the cap, [B, V]."""
        raw = self.scale[:, None] * self.lean
        return raw if self.offset is None else raw + self.offset

    @cached_property
    def log_probs(self) -> Tensor:
        """[B, V]."""
        logits = self.raw if self.cap is None else self.cap * torch.tanh(self.raw / self.cap)
        return torch.log_softmax(logits, -1)

    def scaled(self, values: Tensor, gain: Tensor | None, rescale: Tensor | None, source: Tensor) -> Tensor:
        """Writes [G, R, k] as they change the logits: times the norm's scale after the write, and its gain."""
        after = self.scale[source, None]
        scaled = values * (after if rescale is None else after + rescale)[..., None]
        return scaled if gain is None else scaled * gain.to(scaled.dtype)

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
