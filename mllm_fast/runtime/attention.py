"""Exact attention under masks and knockouts."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import InputError
from ..kernels import Attention, join, knockout_attention, wide_type, without_autocast
from ..kernels.knockout_attention import HEAD_SIZES, torch_kernel
from ..kernels.knockout_attention.reference import capped, log_sum_exp, open_pairs, weights
from .row_mask import RowMask

_ROW_BLOCK = 256  # query rows whose mask is materialised at a time
Closed = tuple[Tensor, Tensor]  # segments and table of `knockout_attention`


class Scoring(NamedTuple):
    """How queries and keys become attention weights; see `knockout_attention`.

    Attributes:
        scale: Factor of the scores.
        softcap: Soft cap of the scores, or None.
        sinks: Score of each head's attention sink, [H], or None.
    """

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether the weights are the softmax of the scaled scores alone."""
        return self.softcap is None and self.sinks is None

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Return the scores [B, H, R, N] of queries [B, H, R, D] and keys [B, H, N, D]."""
        return capped(query @ key.mT * self.scale, self.softcap)

    def weights(self, scores: Tensor) -> Tensor:
        """Return the attention weights of scores, in which unseen keys are -inf, or the lowest number."""
        return weights(scores, self.sinks)


@without_autocast
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scoring: Scoring,
    closed: Closed | None = None,
    mass: bool | Tensor = False,
    backend: str = "auto",
) -> Attention:
    """Compute exact attention under a mask and knockouts.

    Causal attention runs on the kernel. Any other rule (a sliding window) and ready masks run on torch's SDPA, one
    block of rows at a time. Rows that see no key give zeros.

    Args:
        query: [B, H, R, D].
        key, value: [B, Hkv, N, D].
        mask: A `RowMask`, or a ready 4-D mask, as transformers lets a caller pass one.
        scoring: How scores become weights.
        closed: Segments and table of the knockouts, which apply on top of the mask.
        mass: True for the mean attention of all rows to each key, or a bool [B, R] for the mean over these rows.
        backend: The backend of the kernel.

    Returns:
        The output [B, H, R, D] and, if asked for, the mean attention to each key [B, H, N].

    Raises:
        InputError: `backend` names a kernel, but only SDPA computes this attention.
    """
    if query.shape[3] != value.shape[3]:
        size, (query, key, value) = value.shape[3], _even(query, key, value)
        found = attend(query, key, value, mask, scoring, closed, mass, backend)
        return found._replace(output=found.output[..., :size])
    fits = HEAD_SIZES[0] <= query.shape[3] <= HEAD_SIZES[1]
    if isinstance(mask, RowMask) and mask.left_padded and fits:
        segments, table = closed or (None, None)
        masks = {"segments": segments, "table": table, "start": mask.start}
        return knockout_attention(query, key, value, **masks, **scoring._asdict(), mass=mass, backend=backend)
    if mask is None:  # without a mask the attention would not be causal
        raise RuntimeError("no mask came with this attention: the model does not use transformers' mask interface")
    if backend in ("cpu", "triton"):
        raise InputError(
            f"backend={backend!r} serves causal attention with heads of {HEAD_SIZES[0]} to {HEAD_SIZES[1]}; this is"
            f" {'a rule or mask of its own' if fits else f'a head of {query.shape[3]}'}: use backend='auto' or 'torch'"
        )
    rows, keys, groups = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = torch.empty_like(query)
    share = query.new_zeros(*query.shape[:2], keys, dtype=wide_type(query.dtype))
    chosen = torch.ones(1, rows, device=query.device) if isinstance(mass, bool) else mass
    weight = chosen.to(share.dtype) / chosen.to(share.dtype).sum(-1, keepdim=True).clamp_min(1)
    for start in range(0, rows, _ROW_BLOCK):
        stop = min(start + _ROW_BLOCK, rows)
        seen, bias = seen_by(mask, start, stop, rows, keys, closed)
        part = query[:, :, start:stop]
        if scoring.plain:
            block = seen if bias is None else bias.masked_fill(~seen, torch.finfo(bias.dtype).min)
            found = F.scaled_dot_product_attention(part, key, value, attn_mask=block, scale=scoring.scale)
            out[:, :, start:stop] = found.masked_fill(~seen.any(-1, keepdim=True), 0)
        if mass is not False or not scoring.plain:
            scores = scoring.scores(part.to(share.dtype), key.to(share.dtype))
            if bias is not None:
                scores = scores + bias
            alpha = scoring.weights(scores.masked_fill(~seen, -torch.inf)).masked_fill(~seen, 0)
            share += (weight[:, None, None, start:stop] @ alpha)[:, :, 0]
        if not scoring.plain:
            out[:, :, start:stop] = alpha @ value.to(alpha)
    return Attention(out, None, None if mass is False else share)


@without_autocast
def attend_split(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor | None,
    scoring: Scoring,
    *,
    causal: bool,
    mass: bool = False,
    backend: str = "auto",
) -> Attention:
    """Compute attention over a part of the keys.

    The result has the log-sum-exp that joins it to attention over the other keys; see `knockout_attention`.
    """
    if query.shape[3] != value.shape[3]:
        size, (query, key, value) = value.shape[3], _even(query, key, value)
        found = attend_split(query, key, value, start, scoring, causal=causal, mass=mass, backend=backend)
        return found._replace(output=found.output[..., :size])
    if HEAD_SIZES[0] <= query.shape[3] <= HEAD_SIZES[1]:
        return knockout_attention(
            query, key, value, start=start, **scoring._asdict(), lse=True, mass=mass, causal=causal, backend=backend
        )
    if backend in ("cpu", "triton"):
        raise InputError(
            f"backend={backend!r} serves heads of {HEAD_SIZES[0]} to {HEAD_SIZES[1]}; these are of {query.shape[3]}:"
            " use backend='auto' or 'torch'"
        )
    scale, softcap, sinks = scoring
    found = torch_kernel.attention(query, key, value, None, None, start, scale, True, mass, causal, softcap, sinks)
    return Attention(*found)


def _even(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of one head size, filled up with zeros, which change no score and no output."""
    size = max(query.shape[3], value.shape[3])
    return tuple(F.pad(one, (0, size - one.shape[3])) for one in (query, key, value))  # type: ignore[return-value]


@without_autocast
def attend_seen(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scoring: Scoring) -> Attention:
    """Compute attention over the keys that a mask lets each row see, with the log-sum-exp of the scores.

    Args:
        query: [B, H, R, D].
        key, value: [B, Hkv, N, D].
        seen: bool [B or 1, 1, R, N].
        scoring: How scores become weights.
    """
    wide, groups = wide_type(query.dtype), query.shape[1] // key.shape[1]
    scores = scoring.scores(query.to(wide), key.to(wide).repeat_interleave(groups, 1))
    lse = log_sum_exp(scores.masked_fill(~seen, -torch.inf), scoring.sinks)
    alpha = (scores - lse.clamp_min(torch.finfo(wide).min)[..., None]).exp().masked_fill(~seen, 0)
    return Attention((alpha @ value.to(wide).repeat_interleave(groups, 1)).to(value.dtype), lse, None)


def join_rows(own: tuple[Tensor, Tensor], prefix: Attention) -> Tensor:
    """Join the attention of T rows to keys in two places by the log-sum-exps, and return it as [1, H, T, D].

    Args:
        own: Output [T, H, D] and log-sum-exp [T, H] over the rows' own keys.
        prefix: Output [1, H, T, D] and log-sum-exp [1, H, T] over the rows' prefixes, as `attend_split` returns them.
    """
    output, total = own
    return join(Attention(output.transpose(0, 1)[None], total.transpose(0, 1)[None], None), prefix)


@without_autocast
def attend_dense(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring, closed: Closed | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the attention of `attend` with its weights as an array, through which gradients flow.

    Returns:
        The output [B, H, R, D] and the attention weights alpha [B, H, R, N].
    """
    if mask is None:
        raise RuntimeError("no mask came with this attention: the model does not use transformers' mask interface")
    rows, keys, groups = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    seen, bias = seen_by(mask, 0, rows, rows, keys, closed)
    wide = wide_type(query.dtype)
    scores = scoring.scores(query.to(wide), key.to(wide))
    scores = scores if bias is None else scores + bias
    # the lowest number in place of -inf, which would give NaN gradients for a row that sees no key
    alpha = scoring.weights(scores.masked_fill(~seen, torch.finfo(wide).min)).masked_fill(~seen, 0)
    return alpha.to(value.dtype) @ value, alpha


def seen_by(
    mask: Tensor, start: int, stop: int, rows: int, keys: int, closed: Closed | None
) -> tuple[Tensor, Tensor | None]:
    """Return which keys rows `start` to `stop` of `rows` see, and what a ready float mask adds to their scores.

    The mask alone decides about causality: a ready mask or another rule may let a row see later keys. Knockouts close
    only the pairs that they name.

    Returns:
        bool [B or 1, 1 or H, stop - start, keys], and the float mask of these rows, or None.
    """
    bias = None
    if isinstance(mask, RowMask):
        seen = mask.block(start, stop)
    else:
        seen = mask[:, :, start:stop, :keys]
        if seen.dtype != torch.bool:
            bias, seen = seen, seen > torch.finfo(seen.dtype).min / 2
    if closed is not None:
        segments, table = closed
        first = start + first_row(mask, rows, keys)
        seen = seen & open_pairs(segments[:, first : first + stop - start], segments, table)[:, None]
    return seen, bias


def first_row(mask: Tensor, rows: int, keys: int) -> int:
    """Return the position of the first row among the keys; under a ready mask the rows are the last keys."""
    return mask.offset - mask.key_offset if isinstance(mask, RowMask) else keys - rows
