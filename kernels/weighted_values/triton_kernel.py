"""The weighted values on a GPU: one program per head, with one pass over its keys and one over its values."""

# ruff: noqa: N803  constants of the compilation are written in capitals, as all Triton code does
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N = 32  # positions read at a time
WARPS = 4
_LOG2E = 1 / math.log(2)
_VECTOR = 16  # bytes that one load can take


@triton.jit(do_not_specialize=["count"])
def weigh(
    query,  # [L * H, WIDTH]
    places,  # int64 [G, 6]: row of query; address and stride of the head's keys, of its values; address of seen, or 0
    scales,  # float32 [G], in bits
    scores,  # float32 [G, count], scratch
    out,  # float32 [G, count, WIDTH]
    count,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,  # elements that every row's start is a multiple of
):
    head = tl.program_id(0).to(tl.int64)
    place = places + head * 6
    element: tl.constexpr = query.dtype.element_ty
    depth = tl.arange(0, BLOCK_D)
    inside = depth < WIDTH
    q = tl.load(query + tl.load(place) * WIDTH + depth, mask=inside, other=0.0).to(tl.float32)
    q *= tl.load(scales + head)
    keys = tl.load(place + 1).to(tl.pointer_type(element))
    keys = tl.multiple_of(keys, VECTOR * (element.primitive_bitwidth // 8))
    stride = tl.multiple_of(tl.load(place + 2), VECTOR)
    seen_at = tl.load(place + 5)
    seen = seen_at.to(tl.pointer_type(tl.uint8))
    masked = tl.where(seen_at != 0, count, 0)  # without a mask nothing is read from `seen`
    scores += head * count
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    for first in range(0, count, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        k = tl.load(keys + n[:, None] * stride + depth[None, :], mask=(n < count)[:, None] & inside[None, :], other=0.0)
        x = tl.sum(k.to(tl.float32) * q[None, :], 1)
        open_ = (n < count) & (tl.load(seen + n, mask=n < masked, other=1) != 0)
        x = tl.where(open_, x, float("-inf"))
        tl.store(scores + n, x, mask=n < count)
        more = tl.maximum(top, tl.max(x, 0))
        held = tl.where(more == float("-inf"), 0.0, more)
        total = total * tl.exp2(top - held) + tl.sum(tl.exp2(x - held), 0)
        top = more
    values = tl.load(place + 3).to(tl.pointer_type(element))
    values = tl.multiple_of(values, VECTOR * (element.primitive_bitwidth // 8))
    stride = tl.multiple_of(tl.load(place + 4), VECTOR)
    out += head * count * WIDTH
    tl.debug_barrier()  # a score may be read by another thread than the one that wrote it
    for first in range(0, count, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        both = (n < count)[:, None] & inside[None, :]
        alpha = tl.exp2(tl.load(scores + n, mask=n < count, other=float("-inf")) - top) / total
        v = tl.load(values + n[:, None] * stride + depth[None, :], mask=both, other=0.0)
        tl.store(out + n[:, None] * WIDTH + depth[None, :], alpha[:, None] * v.to(tl.float32), mask=both)


def weighted_values(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    heads: Sequence[tuple[int, int]],
    count: int,
    scale: Sequence[float],
    seen: Sequence[Tensor | None],
) -> Tensor:
    """Compute `torch_kernel.weighted_values`."""
    _, each, width = query.shape
    out = query.new_empty(len(heads), count, width, dtype=torch.float32)
    if not len(heads):
        return out
    used = {layer for layer, _ in heads}
    masks = {layer: _on(seen[layer], query.device) for layer in used}
    places = []
    for layer, head in heads:
        k, v, mask = keys[layer], values[layer], masks[layer]
        shared, size = head // (each // len(k)), k.element_size()
        starts = [x.data_ptr() + shared * x.stride(0) * size for x in (k, v)]
        row = layer * each + head
        places.append([row, starts[0], k.stride(1), starts[1], v.stride(1), 0 if mask is None else mask.data_ptr()])
    scales = torch.tensor([scale[layer] * _LOG2E for layer, _ in heads], dtype=torch.float32, device=query.device)
    scores = out.new_empty(len(heads), count)
    constants = {"BLOCK_D": triton.next_power_of_2(width), "VECTOR": vector(places, query.element_size())}
    with torch.cuda.device_of(query):
        weigh[(len(heads),)](
            query.contiguous(), torch.tensor(places, device=query.device), scales, scores, out, count, WIDTH=width,
            BLOCK_N=BLOCK_N, **constants, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def vector(places: Sequence[Sequence[int]], size: int) -> int:
    """Return how many elements one load may take: 16 bytes if every row starts at a multiple of 16 bytes, else 1."""
    starts = (start for _, k, k_stride, v, v_stride, _ in places for start in (k, k_stride * size, v, v_stride * size))
    return 1 if any(start % _VECTOR for start in starts) else _VECTOR // size


def _on(mask: Tensor | None, device: torch.device) -> Tensor | None:
    return None if mask is None else mask.to(device).contiguous().view(torch.uint8)
