"""The increase of log p(token) by a write to the residual stream (arXiv 2411.10950, equation 6).

    S(w) = log p(b | h + w) - log p(b | h),    p(. | x) = softmax(W_U norm(x))

The norm has the scale r0 at h and r at h + w. The logits change by

    d = r W_U diag(g) w + (r - r0) a,    a = W_U diag(g) h

so that S = d_b - log sum_v p_v exp(d_v) with p at h. Small numbers are subtracted before anything is exponentiated,
and no array of rows x vocabulary is stored.

There are two ways to compute d, and tests hold their results equal. The direct way computes d from W_U and the write
itself, with 2 V d flops per row. The factored way takes writes w = O u of a head, where u has d_head numbers. It needs
only the operator M = W_U diag(g) O, which depends on the weights alone. It costs 2 V d_head flops per row, and
2 V d d_head flops once for M unless M is cached.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..dispatch import kernel_of
from .base import Base, check_range
from .operators import OperatorCache, Operators, weight_state
from .unembedding import Unembedding

__all__ = ["Base", "OperatorCache", "Unembedding", "logprob_increase", "weight_state"]

WAYS = ("auto", "direct", "factored")


@torch.no_grad()
@without_autocast
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
    """Compute the increase of log p(token) by each write to the residual stream.

    There are G groups of R writes. All writes of a group go to the same residual vector. Inference only: no gradient
    flows.

    Args:
        residual: Residual vectors h, [G, d], or [B, d] with `source`. It can also be a `Base` made from the residual
            vectors, tokens, norm and final; `tokens` and `final` are then omitted, and `norm` is not used. Calls that
            write to the same residual vectors and share a `Base` compute their logits once.
        values: Writes, [G, R, d]. With `projection`, the vectors u that it projects, [G, R, k].
        tokens: Explained token b of each residual vector, int64 [G] (or [B]). -1 stands for no word, whose logit no
            write changes.
        unembedding: Final norm and unembedding.
        projection: Output projection O of the head of each group, [G, d, k], or a sequence of G tensors [d, k]. The
            writes are then O u. The tensors of a sequence are read only where they are needed.
        norm: "own" uses the statistics of h and of h + w in the final norm (equation 6). "frozen" uses the statistics
            of `final` (the paper's released notebook).
        final: Output of the final layer at the explained row, [G, d] (or [B, d]); required for "frozen".
        source: Index of the residual vector that each group writes to, int64 [G]. The heads of a layer share one
            residual vector, and its logits are then computed once.
        way: "direct", "factored", or "auto" for the way with fewer flops.
        operators, keys: Cache of the operators of the factored way, and the keys of the G operators in it. A key is
            the name of a head and the `weight_state` of the weight of its projection.
        backend: "triton", "cpu", "torch" or "auto"; see `mllm_fast.kernels.dispatch`.

    Returns:
        S, [G, R], in float32, or in float64 if the unembedding is float64. It is exact to that precision, except for
        these roundings. The factored way rounds its operator to the dtype of the unembedding. The Triton kernels
        round the scaled writes to that dtype, because tensor cores take both operands in one dtype. In bfloat16 and
        float16 they compute the log-sum-exp of small writes from its expansion, where a bound proves that the rest is
        within another such rounding (`triton_moments`).

    Raises:
        ValueError: A choice is unknown, shapes do not fit, or a token is outside the vocabulary.
    """
    if unembedding is None:
        raise ValueError("unembedding is needed: the final norm and the unembedding")
    if source is not None:  # checked first, because reading it waits for the GPU
        known = isinstance(residual, Base) and not residual.checked
        _check_source(source, len(residual.residual if isinstance(residual, Base) else residual), not known)
    base = _base(residual, tokens, unembedding, norm, final, backend)
    _check(base, values, unembedding, projection, source, way, operators, keys)
    wide = base.residual.dtype
    kernel = kernel_of("logprob_increase", base.residual.device, unembedding.weight.dtype, backend)
    own_mean = unembedding.kind == "layer" and base.norm == "own"  # whether the norm subtracts the write's own mean
    made = None if projection is None else Operators(unembedding, projection, own_mean, operators, keys)
    if way == "auto":
        way = _cheaper_way(values, unembedding, made)
    if way == "direct" or base.norm == "own":  # else the kernel reads them once, in any dtype
        values = values.to(wide)
    outward = None
    if projection is not None and (way == "direct" or base.norm == "own"):
        stacked = projection if isinstance(projection, Tensor) else torch.stack(list(projection))
        outward = stacked.to(wide)
    if way == "direct" and outward is not None:
        values, outward = values @ outward.mT, None
    rescale = None if base.norm == "frozen" else base.rescale(values, outward, base.each(source), unembedding)
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


def _cheaper_way(values: Tensor, unembedding: Unembedding, operators: Operators | None) -> str:
    """Return the way with fewer flops.

    The direct way costs 2 R V d per group, and the projection. The factored way costs 2 R V k per group, and 2 V d k
    for each operator that is not at hand.
    """
    if operators is None:
        return "direct"
    groups, rows, depth = values.shape
    vocab, width = unembedding.weight.shape
    direct = groups * rows * width * (vocab + depth)
    factored = groups * rows * vocab * depth + operators.to_make * vocab * width * depth
    return "factored" if factored <= direct else "direct"


def _check_source(source: Tensor, count: int, checked: bool) -> None:
    if source.ndim != 1 or source.dtype != torch.int64:
        raise ValueError(f"source is int64 [G], got {source.dtype} {tuple(source.shape)}")
    if checked:
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
