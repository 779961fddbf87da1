"""A linear layer for few rows, such as those of a decoding step or a short question.

    out = x weight^T + bias

The speed is limited by reading the weight, not by multiplying. Code that multiplies large matrices well reads the
weight at half of the memory's speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import choose
from ..paths import paths
from . import torch_kernel

__all__ = ["skinny_linear", "worth_reading"]

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_ALWAYS = 256  # rows that stay in the caches at any depth
_LEAST_BYTES = 1 << 18  # a smaller weight stays in the processor's caches, where torch is as fast


def worth_reading(weight: Tensor) -> bool:
    """Return whether a weight is large enough for this op to matter."""
    return weight.nbytes >= _LEAST_BYTES


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Compute x weight^T + bias, summed in float32 (float64 for float64).

    Args:
        x: Input rows, [..., k].
        weight: [n, k], in the dtype of `x`, or in bfloat16 or float16 where `x` is wider. A narrower weight is never
            widened as a whole.
        bias: [n] in the dtype of the weight, or None.
        backend: "cpu", "torch" or "auto"; see `mllm_fast.kernels.dispatch`. "auto" uses the C++ kernel for few rows
            and a large weight on the CPU if no gradient is needed, else torch.

    Returns:
        Output rows, [..., n], in the dtype of `x`.

    Raises:
        ValueError: An argument is not valid. The message names the argument, what it got and what it takes.
    """
    _check(x, weight, bias)
    wants_grad = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in (x, weight, bias))
    if backend == "auto" and (wants_grad or not _few(x, weight)):
        backend = "torch"
    if choose(weight.device, weight.dtype, backend, op="skinny_linear") == "torch":
        return torch_kernel.linear(x, weight, bias)
    if wants_grad:
        raise ValueError("backend 'cpu' computes no gradients: use 'torch' or 'auto', or torch.no_grad()")
    if x.dtype not in (weight.dtype, torch.float32):
        raise ValueError(f"backend 'cpu' takes x in {weight.dtype} as the weight or float32, got {x.dtype}")
    from . import cpu_kernel

    return cpu_kernel.linear(x, weight, bias)


def _few(x: Tensor, weight: Tensor) -> bool:
    rows = x.numel() // max(1, weight.shape[1])
    fits = x.dtype == weight.dtype or x.dtype == torch.float32
    if not (fits and rows and worth_reading(weight)):
        return False
    least, most = paths().rows.get(_NAMES.get(weight.dtype, ""), (1, 0))
    # the number of rows was measured at a depth of 1,024; many deeper rows leave the caches earlier
    return least <= rows <= most and (rows <= _ALWAYS or rows * weight.shape[1] <= most * 1024)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x is [..., k] and weight [n, k], got {list(x.shape)} and {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is [{weight.shape[0]}], got {list(bias.shape)}")
    if not x.dtype.is_floating_point or x.dtype.itemsize < weight.dtype.itemsize:
        raise ValueError(f"x is floating and no narrower than weight, {weight.dtype}, got {x.dtype}")
    for name, one in (("x", x), ("bias", bias)):
        if one is not None and one.device != weight.device:
            raise ValueError(f"{name} is on {weight.device} as weight is, got {one.device}")
