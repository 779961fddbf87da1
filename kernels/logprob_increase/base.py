"""The part of the increase that depends on the residual vectors alone, shared by calls that write to the same ones."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ..dispatch import wide_type
from .unembedding import Unembedding


class Base:
    """B residual vectors with their explained tokens and their logits.

    The logits before the soft cap are scale * lean + offset.

    Args:
        residual: Residual vectors h, [B, d].
        tokens: Explained token of each residual vector, int64 [B]. -1 stands for no word: no write changes its logit.
        unembedding: Final norm and unembedding.
        norm, final, backend: As in `logprob_increase`.
        checked: Whether tokens, and later sources, are checked to lie in their ranges, which waits for the device.

    Attributes:
        scale: Scale of the norm at each residual vector, [B].
        lean: Change of the logits per unit of the norm's scale, [B, V].
        offset: Part of the logits that does not depend on the residual vectors, [V], or None.
        cap: The soft cap, or None.

    Raises:
        ValueError: An argument is not valid. The message names the argument, what it got and what it takes.
    """

    def __init__(
        self,
        residual: Tensor,
        tokens: Tensor,
        unembedding: Unembedding,
        norm: str = "frozen",
        final: Tensor | None = None,
        backend: str = "auto",
        checked: bool = True,
    ):
        _check(residual, tokens, unembedding, norm, final, checked)
        self.checked = checked
        wide = wide_type(unembedding.weight.dtype)
        self.norm, self.tokens, self.final = norm, tokens, final
        self.residual = residual.to(wide)
        measured = self.residual if norm == "own" else final.to(wide)  # type: ignore[union-attr]
        self.scale = unembedding.scale(measured)
        h = self.residual
        if unembedding.kind == "layer":
            h = h - measured.mean(-1, keepdim=True)
        plain = "torch" if backend == "torch" else "auto"  # the other backends have no linear layer of their own
        self.lean = unembedding.of_rows(h, plain)
        self.offset = unembedding.offset(wide, plain)
        self.cap = unembedding.softcap

    @cached_property
    def raw(self) -> Tensor:
        """The logits before the soft cap, [B, V]."""
        raw = self.scale[:, None] * self.lean
        return raw if self.offset is None else raw + self.offset

    @cached_property
    def log_probs(self) -> Tensor:
        """The log-probabilities of all tokens at each residual vector, [B, V]."""
        logits = self.raw if self.cap is None else self.cap * torch.tanh(self.raw / self.cap)
        return torch.log_softmax(logits, -1)

    @cached_property
    def mass(self) -> Tensor:
        """The log-sum-exp of the logits at each residual vector, [B]."""
        logits = self.raw if self.cap is None else self.cap * torch.tanh(self.raw / self.cap)
        return torch.logsumexp(logits, -1)

    def each(self, source: Tensor | None) -> Tensor:
        """Return the index of the residual vector of each group, int64 [G]; None stands for 0, 1, 2, ..."""
        return torch.arange(len(self.lean), device=self.lean.device) if source is None else source

    def scaled(self, values: Tensor, gain: Tensor | None, rescale: Tensor | None, source: Tensor) -> Tensor:
        """Return the writes [G, R, k] times the norm's scale after the write and its gain.

        Args:
            values: Writes, [G, R, k].
            gain: Gain of the norm, [k], or None.
            rescale: Change of the norm's scale by each write, [G, R], or None for frozen statistics.
            source: Residual vector of each group, int64 [G].

        Returns:
            The scaled writes, [G, R, k]; multiplied by the operands they are the change of the logits.
        """
        after = self.scale[source, None]
        scaled = values * (after if rescale is None else after + rescale)[..., None]
        return scaled if gain is None else scaled * gain.to(scaled.dtype)

    def rescale(self, values: Tensor, outward: Tensor | None, source: Tensor, unembedding: Unembedding) -> Tensor:
        """Return the change of the norm's scale by each write, whose own statistics the norm takes.

        It is computed from the change of the mean square. A difference of the two scales would lose precision, because
        for a small write they agree in all digits but the last. With a projection the change comes from the
        d_head x d_head Gram matrix, without computing the write.

        Args:
            values: Writes [G, R, d], or what `outward` projects, [G, R, k].
            outward: Output projection of the head of each group, [G, d, k], or None.
            source: Residual vector of each group, int64 [G].
            unembedding: Final norm and unembedding.

        Returns:
            r - r0 for each write, [G, R], with the norm's scale r0 at the residual vector and r after the write.
        """
        h = unembedding.centred(self.residual)
        width = h.shape[-1]
        before = (h.square().mean(-1) + unembedding.eps)[source, None]
        h = h[source, :, None]
        if outward is None:
            w = unembedding.centred(values)
            change = 2 * (w @ h)[..., 0] + w.square().sum(-1)
        else:
            outward = unembedding.centred(outward.mT).mT
            change = 2 * (values @ (outward.mT @ h))[..., 0] + ((values @ (outward.mT @ outward)) * values).sum(-1)
        change = change / width
        root_before, root_after = before.sqrt(), (before + change).clamp_min(unembedding.eps).sqrt()
        return -change / (root_before * root_after * (root_before + root_after))

    def of(self, source: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Return log_probs, lean, shift and raw of groups in the form that a kernel takes.

        Args:
            source: Residual vector of each group, int64 [G].
            shift: Change of the norm's scale by each write, [G, R], or None for frozen statistics.

        Returns:
            The log-probabilities [G, V]; `lean` [G, V] and `shift` [G, R], or None for frozen statistics; the raw
            logits [G, V], or None without a soft cap.
        """
        lean = None if shift is None else self.lean[source]
        return self.log_probs[source], lean, shift, None if self.cap is None else self.raw[source]

    def explained(self, writes: Tensor, rows: Tensor, shift: Tensor | None, source: Tensor) -> Tensor:
        """Return the change of the logits of the explained tokens by scaled writes.

        Args:
            writes: Scaled writes, [G, R, k]; see `scaled`.
            rows: Row of the operand of each group at its explained token, [G, k].
            shift: Change of the norm's scale by each write, [G, R], or None for frozen statistics.
            source: Residual vector of each group, int64 [G].

        Returns:
            The change, [G, R].
        """
        tokens = self.tokens[source]
        change = (writes @ rows.to(writes.dtype)[..., None])[..., 0]
        if shift is not None:
            change = change + shift * self.lean[source, tokens][:, None]
        if self.cap is not None:
            before = self.raw[source, tokens][:, None] / self.cap
            change = self.cap * (torch.tanh(before + change / self.cap) - torch.tanh(before))
        return change.masked_fill(tokens[:, None] < 0, 0)


NORMS = ("frozen", "own")


def _check(residual, tokens, unembedding, norm, final, checked) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm is one of {', '.join(NORMS)}, got {norm!r}")
    vocab, width = unembedding.weight.shape
    if residual.ndim != 2 or residual.shape[1] != width:
        raise ValueError(f"residual is [B, {width}], got {tuple(residual.shape)}")
    count = len(residual)
    if tokens.shape != (count,) or tokens.dtype != torch.int64:
        raise ValueError(f"tokens is int64 [{count}], got {tokens.dtype} {tuple(tokens.shape)}")
    if checked:
        check_range("tokens lie", tokens.tolist(), vocab, least=-1)
    if norm == "frozen" and (final is None or final.shape != residual.shape):
        got = None if final is None else tuple(final.shape)
        raise ValueError(f"norm='frozen' needs final [{count}, {width}], the final layer's output, got {got}")


def check_range(what: str, ids: list[int], stop: int, least: int = 0) -> None:
    if ids and not (min(ids) >= least and max(ids) < stop):
        raise ValueError(f"{what} in {least} .. {stop - 1}, got {min(ids)} .. {max(ids)}")
