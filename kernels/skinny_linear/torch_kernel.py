"""The linear layer in plain torch, for any number of rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

_CHUNK = 1 << 24  # elements of a weight that are widened at a time: 64 MiB of float32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `skinny_linear` for any number of rows."""
    if weight.dtype == x.dtype:
        return F.linear(x, weight, bias)
    if weight.is_cuda and (x.dtype, weight.dtype) == (torch.float32, torch.bfloat16) and not torch.is_grad_enabled():
        out = _in_parts(x, weight)
        return out if bias is None else out + bias.to(x.dtype)
    out = x.new_empty(*x.shape[:-1], len(weight))
    for block in blocks(weight):
        out[..., block] = x @ weight[block].to(x.dtype).T
    return out if bias is None else out + bias.to(x.dtype)


def _in_parts(x: Tensor, weight: Tensor) -> Tensor:
    """Compute x weight^T on a GPU for float32 `x` and a bfloat16 weight, without widening the weight.

    `x` is split into the sum of three bfloat16 numbers, which hold its 24 bits. The products of the tensor cores are
    exact, and their sums are float32.
    """
    rows = x.reshape(-1, x.shape[-1])
    parts = []
    for _ in range(3):
        parts.append(rows.to(weight.dtype))
        rows = rows - parts[-1].to(x.dtype)
    large, middle, small = torch.mm(torch.cat(parts), weight.T, out_dtype=x.dtype).chunk(3)
    return (small + middle + large).reshape(*x.shape[:-1], len(weight))


def blocks(weight: Tensor) -> Iterator[slice]:
    """Return slices of the rows of a weight, one for each block of rows that is widened together."""
    step = max(1, _CHUNK // max(1, weight.shape[1]))
    return (slice(start, start + step) for start in range(0, len(weight), step))
