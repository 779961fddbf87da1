"""The writes in the form that the matrix products take.

The writes are scaled by the norm's scale after the write. Each row is then rounded to the dtype of the operands in
units of its own power of two. This takes one pass, where plain torch needs six.
"""

# ruff: noqa: N803  constants of the compilation are written in capitals, as all Triton code does
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import interpreted

INTERPRETED = tl.constexpr(interpreted())
BLOCK_R, BLOCK_K, WARPS = 32, 128, 4


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Round float32 to the nearest number of a narrower dtype."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter truncates
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(tl.abs(x) < float("inf"), bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def _scaled(at, gain, fits, inside, scale, HAS_GAIN: tl.constexpr):
    write = tl.load(at, mask=fits[:, None] & inside[None, :], other=0.0).to(tl.float32) * scale[:, None]
    if HAS_GAIN:
        write *= tl.load(gain, mask=inside, other=0.0).to(tl.float32)[None, :]
    return write


@triton.jit(do_not_specialize=["count", "rows"])
def round_rows(
    values,  # [count, DEPTH]
    gain,  # [DEPTH]
    after,  # [B]
    shift,  # [count]
    source,  # int64 [groups]
    rounded,  # [count, DEPTH]
    factor,  # [count]
    unit,
    count,
    rows,
    DEPTH: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute rounded = value * (after + shift) * gain / power and factor = power * unit for each row.

    `power` is the power of two that brings the largest number of the row to between 1/2 and 1.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    fits = row < count
    scale = tl.load(after + tl.load(source + row // rows, mask=fits, other=0), mask=fits, other=0.0)
    if HAS_SHIFT:
        scale += tl.load(shift + row, mask=fits, other=0.0)
    depth = tl.arange(0, BLOCK_K)
    at = values + row[:, None] * DEPTH + depth[None, :]
    largest = tl.zeros([BLOCK_R], tl.float32)
    for step in range(0, DEPTH, BLOCK_K):
        write = _scaled(at + step, gain + step + depth, fits, depth + step < DEPTH, scale, HAS_GAIN)
        size = tl.abs(write)
        largest = tl.maximum(largest, tl.max(tl.where(size == size, size, float("inf")), 1))  # NaN counts as infinity
    exponent = ((largest.to(tl.int32, bitcast=True) >> 23) & 255) - 126
    exponent = tl.minimum(tl.maximum(exponent, -100), 100)
    power = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    for step in range(0, DEPTH, BLOCK_K):
        inside = depth + step < DEPTH
        write = _scaled(at + step, gain + step + depth, fits, inside, scale, HAS_GAIN) * inverse[:, None]
        to = rounded + row[:, None] * DEPTH + step + depth[None, :]
        tl.store(to, round_to(write, rounded.dtype.element_ty), mask=fits[:, None] & inside[None, :])
    tl.store(factor + row, power * unit, mask=fits)


def rounded_writes(
    values: Tensor,
    gain: Tensor | None,
    after: Tensor,
    shift: Tensor | None,
    source: Tensor,
    dtype: torch.dtype,
    unit: float,
) -> tuple[Tensor, Tensor]:
    """Scale the writes by the norm and round them to `dtype`, each row in units of its own power of two.

    The norm's scale after a write is after[source] + shift.

    Args:
        values: Writes, [G, R, k], in any dtype.
        gain: Gain of the norm, [k], or None.
        after: Scale of the norm at each residual vector, [B].
        shift: Change of the norm's scale by each write, [G, R], or None.
        source: Residual vector of each group, int64 [G].
        dtype: Dtype of the rounded writes.
        unit: Number that multiplies the returned factors.

    Returns:
        The rounded writes, [G, R, k] in `dtype`, and the factor that brings each row back, float32 [G, R].
    """
    groups, rows, depth = values.shape
    rounded = torch.empty(values.shape, dtype=dtype, device=values.device)
    factor = torch.empty(groups, rows, dtype=torch.float32, device=values.device)
    with torch.cuda.device_of(values):
        round_rows[(triton.cdiv(groups * rows, BLOCK_R),)](
            values.contiguous(), factor if gain is None else gain.contiguous(), after.contiguous(),
            factor if shift is None else shift.contiguous(), source.contiguous(), rounded, factor, unit,
            groups * rows, rows, DEPTH=depth, HAS_GAIN=gain is not None, HAS_SHIFT=shift is not None,
            BLOCK_R=BLOCK_R, BLOCK_K=BLOCK_K, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return rounded, factor
