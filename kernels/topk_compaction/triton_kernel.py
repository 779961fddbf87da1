"""The compaction on a GPU, in three launches for all layers: `rank`, `place` and `copy`.

The rank of a candidate is the number of candidates that are ahead of it. A candidate is kept if its rank is below
`keep`. Counting needs no sort and no atomic operation, so the result is the same every time.
"""

# ruff: noqa: N803  constants of the compilation are written in capitals, as all Triton code does
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_I, BLOCK_J = 128, 32  # positions that a program ranks, and positions that it compares them with at a time
BLOCK_N = 1024  # positions whose kept flags are summed at a time
BLOCK_M = 32  # rows copied by a program
WARPS = 4
_VECTOR = 16  # bytes that one load can take


@triton.jit(do_not_specialize=["positions", "keep"])
def rank(
    mass,  # float32 [L, positions]
    candidates,  # uint8 [positions]
    always,  # uint8 [positions]
    kept,  # int8 [L, positions]
    positions,
    keep,
    ALWAYS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Write which positions of each layer are kept."""
    layer = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    mine = tl.load(mass + layer * positions + i, mask=i < positions, other=0.0)
    mine = tl.where(mine == mine, mine, float("-inf"))
    before = tl.zeros([BLOCK_I], tl.int32)
    for first in range(0, positions, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        other = tl.load(mass + layer * positions + j, mask=j < positions, other=0.0)
        other = tl.where(other == other, other, float("-inf"))[None, :]
        rival = tl.load(candidates + j, mask=j < positions, other=0)[None, :] != 0
        ahead = (other > mine[:, None]) | ((other == mine[:, None]) & (j[None, :] < i[:, None]))
        before += tl.sum((ahead & rival).to(tl.int32), 1)
    stays = (tl.load(candidates + i, mask=i < positions, other=0) != 0) & (before < keep)
    if ALWAYS:
        stays = stays | (tl.load(always + i, mask=i < positions, other=0) != 0)
    tl.store(kept + layer * positions + i, stays.to(tl.int8), mask=i < positions)


@triton.jit(do_not_specialize=["positions", "count"])
def place(kept, chosen, positions, count, BLOCK_N: tl.constexpr):
    """Write the kept positions in ascending order to `chosen`, int64 [L, count], from the flags `kept`, int8 [L, N]."""
    layer = tl.program_id(0).to(tl.int64)
    before = 0
    for first in range(0, positions, BLOCK_N):
        i = first + tl.arange(0, BLOCK_N)
        stays = tl.load(kept + layer * positions + i, mask=i < positions, other=0).to(tl.int32)
        slot = before + tl.cumsum(stays, 0) - 1
        tl.store(chosen + layer * count + slot, i.to(tl.int64), mask=stays != 0)
        before += tl.sum(stays, 0)


@triton.jit(do_not_specialize=["heads", "count"])
def copy(
    sources,  # int64 [2, L, 3]: address, stride of a head, stride of a position; keys, then values
    chosen,  # int64 [L, count]
    gathered,  # [2, L, heads, count, WIDTH]
    heads,
    count,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,  # elements that every row's start is a multiple of
):
    """Copy the kept rows of the keys and values of every layer and head."""
    blocks = tl.cdiv(count, BLOCK_M)
    slot = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(0) // blocks % heads
    which = (tl.program_id(0) // blocks // heads).to(tl.int64)  # index among the 2 L key and value tensors
    layers = tl.num_programs(0) // blocks // heads // 2
    position = tl.load(chosen + which % layers * count + slot, mask=slot < count, other=0)
    start = tl.load(sources + which * 3).to(tl.pointer_type(gathered.dtype.element_ty))
    start += head * tl.load(sources + which * 3 + 1)
    row = position * tl.load(sources + which * 3 + 2)
    depth = tl.arange(0, BLOCK_D)
    both = (slot < count)[:, None] & (depth < WIDTH)[None, :]
    start = tl.multiple_of(start, VECTOR * (gathered.dtype.element_ty.primitive_bitwidth // 8))
    row = tl.multiple_of(row, VECTOR)
    rows = tl.load(start + row[:, None] + depth[None, :], mask=both)
    out = gathered + ((which * heads + head) * count + slot)[:, None] * WIDTH + depth[None, :]
    tl.store(out, rows, mask=both)


def compact(
    mass: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    keep: int,
    candidates: Tensor,
    always: Tensor | None,
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `torch_kernel.compact`."""
    layers, positions = mass.shape
    heads, _, width = keys[0].shape
    chosen = torch.empty(layers, count, dtype=torch.int64, device=mass.device)
    gathered = keys[0].new_empty(2, layers, heads, count, width)
    if not count:
        return chosen, gathered[0], gathered[1]
    kept = torch.empty(layers, positions, dtype=torch.int8, device=mass.device)
    flags = [None if one is None else one.contiguous().view(torch.uint8) for one in (candidates, always)]
    tensors = [*keys, *values]
    sources = torch.tensor([(t.data_ptr(), t.stride(0), t.stride(1)) for t in tensors], device=mass.device)
    constants = {"BLOCK_M": BLOCK_M, "BLOCK_D": triton.next_power_of_2(width), "VECTOR": vector(tensors)}
    with torch.cuda.device_of(mass):
        rank[(triton.cdiv(positions, BLOCK_I), layers)](
            mass.contiguous(), flags[0], flags[0] if always is None else flags[1], kept, positions, keep,
            ALWAYS=always is not None, BLOCK_I=BLOCK_I, BLOCK_J=BLOCK_J, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
        place[(layers,)](kept, chosen, positions, count, BLOCK_N=BLOCK_N, num_warps=WARPS, enable_fp_fusion=True)
        copy[(triton.cdiv(count, BLOCK_M) * heads * len(tensors),)](
            sources, chosen, gathered, heads, count, WIDTH=width, **constants, num_warps=WARPS, enable_fp_fusion=True
        )
    return chosen, gathered[0], gathered[1]


def vector(tensors: Sequence[Tensor]) -> int:
    """Return how many elements one load may take: 16 bytes if every row starts at a multiple of 16 bytes, else 1."""
    size = tensors[0].element_size()
    for tensor in tensors:
        starts = tensor.data_ptr(), tensor.stride(0) * size, tensor.stride(1) * size, tensor.shape[2] * size
        if any(start % _VECTOR for start in starts):
            return 1
    return _VECTOR // size
