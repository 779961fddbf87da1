"""What the increase needs of the residual vectors themselves; calls that write to the same ones share it."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ..dispatch import wide_type
from .unembedding import Unembedding


class Base:
    """B residual vectors, their explained tokens, and the logits there: scale * lean + offset, before the cap.

    Args:
        residual: h, [B, d]. tokens: int64 [B]. norm, final, backend: as in `logprob_increase`.

    Attributes:
        scale: of the norm, [B]. lean: the change of the logits by the norm's scale, [B, V]. offset: what depends on no
            residual vector, [V] or None. cap: the soft cap or None.

    Raises:
        ValueError: names the argument, what it got and what it takes.
    """

    def __init__(
        self,
        residual: Tensor,
        tokens: Tensor,
        unembedding: Unembedding,
        norm: str = "frozen",
        final: Tensor | None = None,
        backend: str = "auto",
    ):
        _check(residual, tokens, unembedding, norm, final)
        wide = wide_type(unembedding.weight.dtype)
        self.norm, self.tokens, self.final = norm, tokens, final
        self.residual = residual.to(wide)
        measured = self.residual if norm == "own" else final.to(wide)  # type: ignore[union-attr]
        self.scale = unembedding.scale(measured)
        h = self.residual
        if unembedding.kind == "layer":
            h = h - measured.mean(-1, keepdim=True)
        plain = "torch" if backend == "torch" else "auto"  # the other choices have no linear layer of their own
        self.lean = unembedding.of_rows(h, plain)
        self.offset = unembedding.offset(wide, plain)
        self.cap = unembedding.softcap

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

    def each(self, source: Tensor | None) -> Tensor:
        """The residual vector of each group, int64 [G], where None stands for one after another."""
        return torch.arange(len(self.lean), device=self.lean.device) if source is None else source

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


NORMS = ("frozen", "own")


def _check(residual, tokens, unembedding, norm, final) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm is one of {', '.join(NORMS)}, got {norm!r}")
    vocab, width = unembedding.weight.shape
    if residual.ndim != 2 or residual.shape[1] != width:
        raise ValueError(f"residual is [B, {width}], got {tuple(residual.shape)}")
    count = len(residual)
    if tokens.shape != (count,) or tokens.dtype != torch.int64:
        raise ValueError(f"tokens is int64 [{count}], got {tokens.dtype} {tuple(tokens.shape)}")
    check_range("tokens lie", tokens.tolist(), vocab)
    if norm == "frozen" and (final is None or final.shape != residual.shape):
        got = None if final is None else tuple(final.shape)
        raise ValueError(f"norm='frozen' needs final [{count}, {width}], the final layer's output, got {got}")


def check_range(what: str, ids: list[int], stop: int) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < stop):
        raise ValueError(f"{what} in 0 .. {stop - 1}, got {min(ids)} .. {max(ids)}")
