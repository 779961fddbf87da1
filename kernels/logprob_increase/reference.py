"""The definition of `logprob_increase` in plain torch, which stores every logit of every row.

It runs in any dtype. In float64 it is the reference of the tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .unembedding import Unembedding


def logprob_increase(
    residual: Tensor,
    values: Tensor,
    tokens: Tensor,
    unembedding: Unembedding,
    *,
    projection: Tensor | None = None,
    norm: str = "frozen",
    final: Tensor | None = None,
) -> Tensor:
    """Compute S(w) = log p(b | h + w) - log p(b | h) (arXiv 2411.10950, equation 6).

    The arguments and the result are those of `mllm_fast.kernels.logprob_increase`.
    """
    writes = values if projection is None else values @ projection.mT
    before = _log_prob(residual[:, None], tokens, unembedding, norm, final)
    after = _log_prob(residual[:, None] + writes, tokens, unembedding, norm, final)
    return after - before


def _log_prob(x: Tensor, tokens: Tensor, unembedding: Unembedding, norm: str, final: Tensor | None) -> Tensor:
    """Return log p(token | x) for x [G, R, d], as [G, R]."""
    u = unembedding
    measured = x if norm == "own" else final[:, None]  # type: ignore[index]
    mean = measured.mean(-1, keepdim=True) if u.kind == "layer" else torch.zeros_like(measured[..., :1])
    scale = torch.rsqrt((measured - mean).square().mean(-1, keepdim=True) + u.eps)
    normed = (x - mean) * scale
    if u.gain is not None:
        normed = normed * u.gain.to(x.dtype)
    if u.norm_bias is not None:
        normed = normed + u.norm_bias.to(x.dtype)
    logits = normed @ u.weight.to(x.dtype).T
    if u.bias is not None:
        logits = logits + u.bias.to(x.dtype)
    if u.softcap is not None:
        logits = u.softcap * torch.tanh(logits / u.softcap)
    log_probs = torch.log_softmax(logits, -1)
    return log_probs.gather(-1, tokens[:, None, None].expand(*log_probs.shape[:2], 1))[..., 0]
