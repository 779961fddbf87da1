"""Launches the Triton kernels of knockout attention. Same contract as torch_kernel.attention.

float32 operands go through the tensor cores as three tf32 products each ("tf32x3"): 21 bits of each factor instead
of 24. float16 and bfloat16 go directly. Everything is accumulated in float32.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .triton_attend import attend, combine, plan_keys
from .triton_mass import mass as mass_of_keys
from .triton_mass import plan_rows

KINDS = ("prefill", "decode", "mass")
MAX_SPLITS = 64
CHUNK = 32  # blocks that a planning kernel looks at together
_DECODE_ROWS = 32  # up to so many rows of a key head are packed into blocks of 16
_SPLIT_BLOCKS = 2  # key blocks that a split has at least
_OPTIONS = {"enable_fp_fusion": True}  # Triton's default is about to change, and warns
_LOG2E = 1 / math.log(2)


class Config(NamedTuple):
    """Tile of rows x keys, warps and pipeline stages of a kernel."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    precision: str = "tf32x3"


# by bytes of an operand and padded head size (up to): chosen so that no register spills and 99 KiB of shared memory
# do on compute capability 8 and 12, 227 KiB on 9 and 10; tests/test_triton_aot.py holds them to it
_TILES = {
    "prefill": {
        2: {64: Config(128, 64, 8, 3), 128: Config(128, 32, 8, 3), 256: Config(64, 32, 8, 2)},
        # three tf32 products of a head of 256 need more registers than there are
        4: {64: Config(32, 32, 4, 2), 128: Config(32, 16, 8, 2), 256: Config(16, 32, 8, 2, "ieee")},
    },
    "decode": {
        2: {128: Config(16, 64, 8, 3), 256: Config(16, 32, 8, 3)},
        4: {128: Config(16, 32, 4, 2), 256: Config(16, 16, 4, 2, "ieee")},
    },
    "mass": {
        2: {128: Config(64, 128, 8, 3), 256: Config(64, 64, 8, 2)},
        4: {64: Config(32, 32, 4, 2), 128: Config(16, 32, 4, 2), 256: Config(16, 32, 8, 2)},
    },
}
# of 16-bit operands where there is shared memory for more
_LARGE_TILES = {("prefill", 128): Config(128, 64, 8, 3), ("decode", 256): Config(16, 64, 8, 2)}


def config(dtype: torch.dtype, head_size: int, capability: tuple[int, int], kind: str) -> Config:
    """What serves operands of `dtype` on a GPU of this compute capability; `kind` is one of KINDS."""
    limit, tile = next((n, tile) for n, tile in _TILES[kind][dtype.itemsize].items() if head_size <= n)
    if dtype.itemsize == 2 and capability[0] in (9, 10):
        return _LARGE_TILES.get((kind, limit), tile)
    return tile


@cache
def _chip(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and number of multiprocessors; a small A100 for Triton's interpreter."""
    if device.type != "cuda":
        return (8, 0), 4
    return torch.cuda.get_device_capability(device), torch.cuda.get_device_properties(device).multi_processor_count


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor | None,
    table: Tensor | None,
    start: Tensor | None,
    scale: float,
    lse: bool,
    mass: bool | Tensor,
    causal: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `reference.attention`; lse and mass in float32."""
    with torch.cuda.device_of(query):  # Triton launches on the current device
        output, total = _attend(query, key, value, segments, table, start, scale, lse or mass is not False, causal)
        share = None
        if mass is not False and total is not None:
            share = _mass(query, key, total, segments, table, start, scale, mass)
    return output.transpose(1, 2), total if lse else None, share


def split_count(programs: int, key_blocks: int, processors: int) -> int:
    """Into how many parts the keys of each row block are cut, for two programs a multiprocessor."""
    return max(1, min(2 * processors // max(1, programs), key_blocks // _SPLIT_BLOCKS, MAX_SPLITS))


def _attend(query, key, value, segments, table, start, scale, lse, causal) -> tuple[Tensor, Tensor | None]:
    """Output [B, R, H, D] and, if `lse`, the log-sum-exp [B, H, R]."""
    batch, heads, rows, width = query.shape
    keys, per_kv = key.shape[2], heads // key.shape[1]
    capability, processors = _chip(query.device)
    packed = per_kv if per_kv * rows <= _DECODE_ROWS else 1
    tile = config(query.dtype, width, capability, "decode" if per_kv * rows <= _DECODE_ROWS else "prefill")
    row_blocks, key_blocks = triton.cdiv(packed * rows, tile.block_m), triton.cdiv(keys, tile.block_n)
    splits = split_count(batch * (heads // packed) * row_blocks, key_blocks, processors)

    like = {"device": query.device, "dtype": torch.float32}
    output = torch.empty(batch, rows, heads, width, device=query.device, dtype=query.dtype)
    total = torch.empty(batch, heads, rows, **like) if lse else None
    parts, part_total = output, total
    if splits > 1:
        parts = torch.empty(splits, batch, rows, heads, width, **like)
        part_total = torch.empty(splits, batch, heads, rows, **like)
    if not output.numel():
        return output, total
    segment_stride = _segment_stride(segments)
    blocks = counts = None
    if segments is not None:
        blocks = torch.empty(batch, row_blocks, key_blocks, device=query.device, dtype=torch.int32)
        counts = torch.empty(batch, row_blocks, 2, device=query.device, dtype=torch.int32)
        plan_keys[(row_blocks, batch)](
            segments, table, start, blocks, counts, segment_stride, packed, rows, keys, key_blocks,
            HAS_START=start is not None, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, CHUNK=CHUNK,
            num_warps=4, **_OPTIONS,
        )  # fmt: skip
    block_d = triton.next_power_of_2(width)
    attend[(batch * (heads // packed), row_blocks, splits)](
        query, key, value, parts, part_total, segments, table, start, blocks, counts, scale * _LOG2E,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], segment_stride,
        heads, per_kv, packed, rows, keys, keys - rows if causal else keys, width, key_blocks,
        HAS_SEGMENTS=segments is not None, HAS_START=start is not None, WITH_LSE=part_total is not None,
        PACKED=packed > 1, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=block_d, EVEN_D=block_d == width,
        PRECISION=tile.precision, num_warps=tile.warps, num_stages=tile.stages, **_OPTIONS,
    )  # fmt: skip
    if splits > 1:
        combine[(batch * rows * heads,)](
            parts, part_total, output, total, heads, rows, width, splits,
            WITH_LSE=lse, MAX_SPLITS=MAX_SPLITS, BLOCK_D=block_d, num_warps=4, **_OPTIONS,
        )  # fmt: skip
    return output, total


def _mass(query, key, total, segments, table, start, scale, chosen) -> Tensor:
    """The mean of alpha over the chosen rows, [B, H, N], from the log-sum-exp [B, H, R]."""
    batch, heads, rows, width = query.shape
    keys, per_kv = key.shape[2], heads // key.shape[1]
    tile = config(query.dtype, width, _chip(query.device)[0], "mass")
    share = torch.empty(batch, heads, keys, device=query.device, dtype=torch.float32)
    if not share.numel():
        return share
    weight = torch.ones(batch, rows, device=query.device) if chosen is True else chosen.float()
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(1)
    row_blocks, key_blocks = triton.cdiv(rows, tile.block_m), triton.cdiv(keys, tile.block_n)
    blocks = torch.empty(batch, key_blocks, row_blocks, device=query.device, dtype=torch.int32)
    counts = torch.empty(batch, key_blocks, device=query.device, dtype=torch.int32)
    segment_stride = _segment_stride(segments)
    flags = {"HAS_SEGMENTS": segments is not None, "HAS_START": start is not None}
    plan_rows[(key_blocks, batch)](
        weight, segments, table, start, blocks, counts, segment_stride, rows, keys, row_blocks,
        **flags, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, CHUNK=CHUNK, num_warps=4, **_OPTIONS,
    )  # fmt: skip
    mass_of_keys[(batch * heads, key_blocks)](
        query, key, total, weight, share, segments, table, start, blocks, counts, scale * _LOG2E,
        *query.stride()[:3], *key.stride()[:3], segment_stride, heads, per_kv, rows, keys, width, row_blocks,
        **flags, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=triton.next_power_of_2(width),
        PRECISION=tile.precision, num_warps=tile.warps, num_stages=tile.stages, **_OPTIONS,
    )  # fmt: skip
    return share


def _segment_stride(segments: Tensor | None) -> int:
    """Between sequences; 0 where all share one."""
    return 0 if segments is None or segments.shape[0] == 1 else segments.stride(0)
