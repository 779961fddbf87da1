"""log p(token) before and after adding a write to the residual stream (arXiv 2411.10950, equation 6).

    S(w) = log p(b | h + w) - log p(b | h),    p(. | x) = softmax(W_U norm(x))

With the norm's scale r0 at h and r at h + w, the logits change by d = r W_U diag(g) w + (r - r0) a, where
a = W_U diag(g) h, so that S = d_b - log sum_v p_v exp(d_v) with p at h: small numbers are subtracted
before anything is exponentiated, and no array of rows x vocabulary is stored.

Two ways, equal and tested to be. Direct: d from W_U and the write itself, 2 V d flops a row. Factored: a
write w = O u of a head (u of d_head numbers) needs only M = W_U diag(g) O, which depends on weights alone:
2 V d_head flops a row, and 2 V d d_head once for M unless it is cached.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ..dispatch import kernel_of
from .base import Base, check_range
from .operators import OperatorCache, Operators, weight_state
from .unembedding import Unembedding

__all__ = ["Base", "OperatorCache", "Unembedding", "logprob_increase", "weight_state"]

WAYS = ("auto", "direct", "factored")


@torch.no_grad()
def logprob_increase(
    residual: Tensor | Base,
    values: Tensor,
    tokens: Tensor | None = None,
    unembedding: Unembedding | None = None,
    *,
    projection: Tensor | Sequence[Tensor] | None = None,
    norm: str = "frozen",
    final: Tensor | None = None,
    source: Tensor | None = None,
    way: str = "auto",
    operators: OperatorCache | None = None,
    keys: Sequence[Hashable] | None = None,
    backend: str = "auto",
) -> Tensor:
    """The increase of log p(token) by each write: G groups of R writes, each group to one residual vector.

    Args:
        residual: h, [G, d]; or with `source`, [B, d]. Or a `Base` that was made of it, the tokens, norm and final,
            which are then not given: calls that write to the same residual vectors make their logits once.
        values: the writes [G, R, d]; or with `projection`, what it projects, [G, R, k].
        tokens: b, the explained token of each residual vector, int64 [G] (or [B]).
        unembedding: final norm and unembedding.
        projection: O, [G, d, k], or G of [d, k], which are then read only where they are needed: a head's output
            projection; the write is then O u.
        norm: "own": the statistics of the final norm are those of h and of h + w themselves (equation 6);
            "frozen": those of `final` (the paper's released notebook).
        final: the final layer's output at the explained row, [G, d] (or [B, d]); needed for "frozen".
        source: which residual vector each group writes to, int64 [G]: the heads of a layer share one, whose
            logits are then made once.
        way: "direct", "factored", or "auto" for the cheaper one by count of flops.
        operators, keys: a cache of the factored way's operators, and the G keys there: a head's name and the
            `weight_state` of its projection's weight.
        backend: "triton", "cpu", "torch" or "auto"; see `mllm_fast.kernels.dispatch`.

    Returns:
        S, [G, R], in float32, or float64 where the unembedding is float64; inference only, no gradient flows.
        Exact to that precision, but that the factored way rounds its operator to the unembedding's dtype, and
        that the Triton kernels round the scaled writes to it: tensor cores take both operands in one type. In
        bfloat16 and float16 they take the log-sum-exp of small writes from its expansion, where a bound proves
        the rest of it to be within another such rounding (`triton_moments`).

    Raises:
        ValueError: an unknown choice, shapes that do not fit, or a token outside the vocabulary.
    """
    if unembedding is None:
        raise ValueError("unembedding is needed: the final norm and the unembedding")
    if source is not None:  # first, as reading it waits for the GPU
        _check_source(source, len(residual.residual if isinstance(residual, Base) else residual))
    base = _base(residual, tokens, unembedding, norm, final, backend)
    _check(base, values, unembedding, projection, source, way, operators, keys)
    wide = base.residual.dtype
    kernel = kernel_of("logprob_increase", base.residual.device, unembedding.weight.dtype, backend)
    own_mean = unembedding.kind == "layer" and base.norm == "own"  # is the write's own mean taken off it?
    made = None if projection is None else Operators(unembedding, projection, own_mean, operators, keys)
    if way == "auto":
        way = _cheaper_way(values, unembedding, made)
    if way == "direct" or base.norm == "own":  # else the kernel reads them once, in whatever type they are
        values = values.to(wide)
    outward = None
    if projection is not None and (way == "direct" or base.norm == "own"):
        stacked = projection if isinstance(projection, Tensor) else torch.stack(list(projection))
        outward = stacked.to(wide)
    if way == "direct" and outward is not None:
        values, outward = values @ outward.mT, None
    rescale = None if base.norm == "frozen" else _rescale(base, values, outward, base.each(source), unembedding)
    if way == "direct":
        if own_mean:
            values = unembedding.centred(values)
        return kernel.increase(base, values, unembedding.gain, unembedding.weight, rescale, source)
    return kernel.increase(base, values, None, made, rescale, source)


def _base(residual, tokens, unembedding, norm, final, backend) -> Base:
    if not isinstance(residual, Base):
        if tokens is None:
            raise ValueError("tokens is needed: the explained token of each residual vector")
        return Base(residual, tokens, unembedding, norm, final, backend)
    if tokens is not None or final is not None:
        raise ValueError("tokens and final belong to a Base already: give the residual vectors, or leave these out")
    return residual


def _rescale(base: Base, values: Tensor, outward: Tensor | None, source: Tensor, unembedding: Unembedding) -> Tensor:
    """r - r0 for each write, [G, R], with the norm's scale r0 at the residual vector and r after the write.

    It is computed from the change of the mean square, not as a difference of two scales: for a small write the two
    agree in all digits but the last. With a projection the change comes from the d_head x d_head Gram matrix, without
    making the write.
    """
    h = unembedding.centred(base.residual)
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


def _cheaper_way(values: Tensor, unembedding: Unembedding, operators: Operators | None) -> str:
    """By flops a group: direct 2 R V d (and the projection); factored 2 R V k, and 2 V d k where the
    operator is not at hand."""
    if operators is None:
        return "direct"
    groups, rows, depth = values.shape
    vocab, width = unembedding.weight.shape
    direct = groups * rows * width * (vocab + depth)
    factored = groups * rows * vocab * depth + operators.to_make * vocab * width * depth
    return "factored" if factored <= direct else "direct"


def _check_source(source: Tensor, count: int) -> None:
    if source.ndim != 1 or source.dtype != torch.int64:
        raise ValueError(f"source is int64 [G], got {source.dtype} {tuple(source.shape)}")
    check_range("source lies", source.tolist(), count)


def _check(base, values, unembedding, projection, source, way, operators, keys) -> None:
    if way not in WAYS:
        raise ValueError(f"way is one of {', '.join(WAYS)}, got {way!r}")
    if way == "factored" and projection is None:
        raise ValueError("way='factored' needs `projection`: without it the values are the writes themselves")
    if (operators is None) != (keys is None):
        raise ValueError("operators and keys go together: give both or neither")
    width = unembedding.weight.shape[1]
    groups = len(base.residual) if source is None else len(source)
    depth = width
    if projection is not None:
        same = isinstance(projection, Tensor) and projection.ndim == 3
        sizes = {tuple(one.shape) for one in (projection[:1] if same else projection)}
        depth = max((size[-1] for size in sizes), default=values.shape[-1])
        if len(projection) != groups or sizes - {(width, depth)}:
            found = f"{len(projection)} of {sorted(sizes)}"
            raise ValueError(f"projection is [{groups}, {width}, k], or {groups} of [{width}, k], got {found}")
    if values.ndim != 3 or values.shape[0] != groups or values.shape[2] != depth:
        raise ValueError(f"values is [{groups}, R, {depth}], got {tuple(values.shape)}")
    if depth < 1:
        raise ValueError(f"values is [{groups}, R, k] with k >= 1, got {tuple(values.shape)}")
    if keys is not None and len(keys) != groups:
        raise ValueError(f"keys has one entry a group, {groups}, got {len(keys)}")
