"""The linear layer in plain torch, for any number of rows."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn import functional as F

_CHUNK = 1 << 24  # elements of a weight that are widened at a time: 64 MiB of float32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `few_row_linear`."""
    if weight.dtype == x.dtype:
        return F.linear(x, weight, bias)
    out = x.new_empty(*x.shape[:-1], len(weight))
    for block in blocks(weight):
        out[..., block] = x @ weight[block].to(x.dtype).T
    return out if bias is None else out + bias.to(x.dtype)


def blocks(weight: Tensor) -> Iterator[slice]:
    """Rows of a weight that are widened together."""
    step = max(1, _CHUNK // max(1, weight.shape[1]))
    return (slice(start, start + step) for start in range(0, len(weight), step))
