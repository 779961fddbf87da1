"""The increase of log p(token) where the words of the unembedding are divided into shards.

Each shard r has its own words, of which it knows the logits. For a write that changes the logits by d,

    t_r = log sum_v p_r(v) exp(d_v),    p_r normalised over the words of r alone,

and with w_r, the share of the whole probability that the words of r have at the residual vector,

    S = d_b - log(1 + sum_r w_r (exp(t_r) - 1)).

So two numbers a write are exchanged between the shards: t_r, and d_b, which the shard of the token b alone knows. Where
the sum is near -1, or too large, log sum_r exp(log w_r + t_r) has the smaller error and stands in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..autocast import without_autocast
from . import logprob_increase
from .base import Base
from .unembedding import Unembedding

_FAR = 1e30  # an excess beyond which the exponentials may overflow


@torch.no_grad()
@without_autocast
def shard_increase(
    base: Base,
    values: Tensor,
    unembedding: Unembedding,
    *,
    projection: Tensor | Sequence[Tensor] | None = None,
    source: Tensor | None = None,
    **choices: Any,
) -> Tensor:
    """Return what one shard of the words knows of the increase by each write.

    Args:
        base: The residual vectors, over the words of the shard. Tokens that are words of other shards are -1.
        values, projection, source: As in `logprob_increase`.
        unembedding: The final norm, and the unembedding of the words of the shard.
        choices: The other arguments of `logprob_increase`.

    Returns:
        t_r, and d_b where the token is a word of the shard or else 0, [2, G, R].
    """
    scores = logprob_increase(base, values, unembedding=unembedding, projection=projection, source=source, **choices)
    each = base.each(source)
    lift = _lift(base, values, unembedding, projection, each).to(scores)
    return torch.stack([lift - scores, lift])


def joined_increase(parts: Tensor, mass: Tensor) -> Tensor:
    """Return the increase by each write, for what all shards know of it.

    Args:
        parts: What `shard_increase` returns, of N shards, [N, 2, G, R].
        mass: The log-sum-exp of each shard's logits at the residual vector of each group (`Base.mass`), [N, G].

    Returns:
        S, [G, R].
    """
    logs = torch.log_softmax(mass, 0)[..., None].to(parts)
    logs = logs.masked_fill(logs == -torch.inf, torch.finfo(logs.dtype).min)  # a shard without a word that can be said
    change = parts[:, 0].masked_fill(logs == torch.finfo(logs.dtype).min, 0)
    excess = (logs.exp() * torch.expm1(change)).sum(0)
    near = (excess >= -0.5) & (excess < _FAR)
    total = torch.where(near, torch.log1p(excess.clamp_min(-0.5)), torch.logsumexp(logs + change, 0))
    return parts[:, 1].sum(0) - total


def _lift(base: Base, values: Tensor, unembedding: Unembedding, projection: Any, source: Tensor) -> Tensor:
    """Return the change of the logit of each residual vector's token, [G, R]; 0 where it is no word of the shard."""
    wide = base.residual.dtype
    values = values.to(wide)
    outward = None
    if projection is not None:
        outward = (projection if isinstance(projection, Tensor) else torch.stack(list(projection))).to(wide)
    rescale = None if base.norm == "frozen" else base.rescale(values, outward, source, unembedding)
    rows = unembedding.weight[base.tokens[source]].to(wide)
    rows = rows if unembedding.gain is None else rows * unembedding.gain.to(wide)
    if unembedding.kind == "layer" and base.norm == "own":
        rows = unembedding.centred(rows)  # the norm subtracts the write's own mean
    if outward is not None:
        rows = (rows[:, None] @ outward)[:, 0]
    return base.explained(base.scaled(values, None, rescale, source), rows, rescale, source)
