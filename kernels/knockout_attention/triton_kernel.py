"""The launches of the Triton kernels of knockout attention, with the same contract as `torch_kernel.attention`.

Products of float32 operands run on the tensor cores as three tf32 products each ("tf32x3"), with 21 bits of each factor
instead of 24. float16 and bfloat16 operands are multiplied directly. Everything is accumulated in float32.

On a chip with an engine that copies tiles, the engine reads the 16-bit keys and values of a prefill. It cannot read
rows that do not begin at multiples of 16 bytes, nor expanded ones. The threads read these, as they do on other chips
(on an H200 in 1.3 to 1.5 times the time).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..triton_launch import Launch, remembered
from ..triton_target import RELEASE, chip
from .triton_attend import attend, combine
from .triton_mass import mass as mass_of_keys

KINDS = ("prefill", "described", "decode", "mass")
MAX_SPLITS = 64
_DECODE_ROWS = 32  # up to this many rows of a key head are packed into blocks of 16
_SPLIT_BLOCKS = 2  # smallest number of key blocks of a split
_OPTIONS = {"enable_fp_fusion": True}  # given explicitly, because Triton's default will change and it warns
_LOG2E = 1 / math.log(2)


class Config(NamedTuple):
    """The tile sizes and the launch options of a kernel.

    Attributes:
        block_m: Rows of a tile.
        block_n: Keys of a tile.
        warps: Warps of a program.
        stages: Pipeline stages.
        precision: How float32 operands are multiplied.
        chunk: Number of blocks, at most 32, that a program surveys together before it reads the open ones.
        registers: Registers that a thread may have, or None. Without a limit the assembler may spill a few bytes to
            fit one more program.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    precision: str = "tf32x3"
    chunk: int = 32
    registers: int | None = None


# kind -> bytes of an operand -> largest padded head size -> tile. No register spills, and 99 KiB of shared memory are
# enough on compute capability 8 and 12, 227 KiB on 9 and 10, which tests/test_triton_attention_aot.py checks. Among
# such tiles these are the fastest on an H200; see benchmarks/NOTES.md
_TILES = {
    "prefill": {
        2: {64: Config(128, 64, 8, 3), 128: Config(128, 32, 8, 3), 256: Config(64, 16, 8, 2)},
        # three tf32 products of a head of 256 need more registers than there are
        4: {64: Config(32, 64, 4, 2), 128: Config(16, 32, 4, 2), 256: Config(16, 16, 4, 2, "ieee")},
    },
    "decode": {
        2: {128: Config(16, 32, 4, 4, registers=255), 256: Config(16, 32, 8, 3)},
        4: {128: Config(16, 32, 4, 2, registers=255)},  # wider heads are served like the rows of a prefill
    },
    "mass": {
        2: {128: Config(64, 128, 8, 3), 256: Config(64, 64, 8, 2, registers=255)},
        4: {64: Config(32, 16, 8, 2, registers=255), 128: Config(16, 32, 8, 2), 256: Config(16, 32, 8, 2)},
    },
}
# tiles of 16-bit keys and values that the copy engine reads, by the capability of chips with such an engine and 227 KiB
_DESCRIBED = {
    9: {64: Config(64, 64, 4, 3), 128: Config(64, 64, 4, 3), 256: Config(128, 32, 8, 3, chunk=16)},
    10: {
        64: Config(64, 64, 4, 4, registers=255),
        128: Config(64, 64, 8, 3, registers=255),
        256: Config(64, 32, 8, 3, registers=255),
    },
}
if RELEASE < (3, 9):  # with these releases the tiles above spill 8 to 32 bytes
    _TILES["mass"][4][256] = Config(16, 16, 8, 2, "ieee")
    _DESCRIBED[9][256] = Config(64, 32, 4, 3, chunk=16) if RELEASE == (3, 8) else Config(128, 16, 8, 3, chunk=16)


def config(dtype: torch.dtype, head_size: int, capability: tuple[int, int], kind: str, capped: bool = False) -> Config:
    """Return the config for operands of `dtype` on a GPU of this compute capability, with or without a soft cap.

    `kind` is one of `KINDS`.
    """
    tiles = _DESCRIBED[capability[0]] if kind == "described" else _TILES[kind][dtype.itemsize]
    tile = next(tile for limit, tile in tiles.items() if head_size <= limit)
    spills = capped if kind in ("decode", "mass") else kind == "prefill" and capability[0] == 10
    return tile._replace(registers=255) if spills and dtype.itemsize == 2 else tile


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
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute `reference.attention`, with lse and mass in float32."""
    with torch.cuda.device_of(query):  # Triton launches on the current device
        with_lse = lse or mass is not False
        output, total = _attend(query, key, value, segments, table, start, scale, with_lse, causal, softcap, sinks)
        share = None
        if mass is not False and total is not None:
            share = _mass(query, key, total, segments, table, start, scale, mass, softcap)
    return output.transpose(1, 2), total if lse else None, share


def split_count(programs: int, key_blocks: int, processors: int) -> int:
    """Return the number of parts into which the keys of a row block are split, for two programs per multiprocessor."""
    return max(1, min(2 * processors // max(1, programs), key_blocks // _SPLIT_BLOCKS, MAX_SPLITS))


class _Plan(NamedTuple):
    """The launches for one set of sizes, the integers that they take, and the number of splits of each row."""

    attend: Launch
    combine: Launch | None
    strides: tuple[int, ...]
    counts: tuple[int, ...]
    described: tuple[int, int] | None  # key block and padded width of the descriptors
    splits: int


_PLANS: dict[Any, _Plan] = {}


def _attend(
    query, key, value, segments, table, start, scale, lse, causal, softcap, sinks
) -> tuple[Tensor, Tensor | None]:
    """Return the output [B, R, H, D] and the log-sum-exp [B, H, R], which is None unless `lse` is set."""
    batch, heads, rows, width = query.shape
    like = {"device": query.device, "dtype": torch.float32}
    output = torch.empty(batch, rows, heads, width, device=query.device, dtype=query.dtype)
    total = torch.empty(batch, heads, rows, **like) if lse else None
    if not output.numel():
        return output, total
    sizes = (
        query.dtype, query.device, query.shape, key.shape, query.stride(), key.stride(), value.stride(),
        _segment_stride(segments), segments is None, start is None, lse, causal, softcap is None, sinks is None,
        # Triton compiles other code for these
        tuple(one is None or one.data_ptr() % 16 == 0 for one in (query, key, value, segments, table, start, sinks)),
    )  # fmt: skip
    plan = remembered(_PLANS, sizes, partial(_plan, query, key, value, segments, start, lse, causal, softcap, sinks))
    parts, part_total = output, total
    if plan.splits > 1:
        parts = torch.empty(plan.splits, batch, rows, heads, width, **like)
        part_total = torch.empty(plan.splits, batch, heads, rows, **like)
    if plan.described is not None:
        key, value = (_described(one, *plan.described) for one in (key, value))
    plan.attend(
        query, key, value, parts, part_total, segments, table, start, sinks, scale * _LOG2E, (softcap or 1.0) * _LOG2E,
        *plan.strides, *plan.counts,
    )  # fmt: skip
    if plan.combine is not None:
        plan.combine(parts, part_total, output, total, sinks, heads, rows, width, plan.splits)
    return output, total


def _plan(query, key, value, segments, start, lse, causal, softcap, sinks) -> _Plan:
    batch, heads, rows, width = query.shape
    keys, per_kv = key.shape[2], heads // key.shape[1]
    capability, processors = chip(query.device)
    decode = per_kv * rows <= _DECODE_ROWS and width <= max(_TILES["decode"][query.element_size()])
    packed = per_kv if decode else 1
    described = not decode and capability[0] in _DESCRIBED and all(map(is_describable, (key, value)))
    kind = "decode" if decode else "described" if described else "prefill"
    tile = config(query.dtype, width, capability, kind, softcap is not None)
    row_blocks, key_blocks = triton.cdiv(packed * rows, tile.block_m), triton.cdiv(keys, tile.block_n)
    groups = heads // packed
    splits = split_count(batch * groups * row_blocks, key_blocks, processors)
    block_d = triton.next_power_of_2(width)
    flags = {"HAS_SEGMENTS": segments is not None, "HAS_START": start is not None}
    flags |= {"HAS_SOFTCAP": softcap is not None, "HAS_SINKS": sinks is not None, "WITH_LSE": lse or splits > 1}
    shape = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_D": block_d, "EVEN_D": block_d == width}
    ways = {"SPLIT": splits > 1, "PACKED": packed > 1, "GROUPED": per_kv > 1}
    ways |= {"DESCRIBED": described, "CHUNK": tile.chunk}
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers, **_OPTIONS}
    last = {"HAS_SINKS": sinks is not None, "WITH_LSE": lse, "MAX_SPLITS": MAX_SPLITS, "BLOCK_D": block_d}
    constants = flags | ways | shape | {"PRECISION": tile.precision}
    return _Plan(
        Launch(attend, (groups, row_blocks * splits, batch), constants, options),
        Launch(combine, (batch * rows * heads, 1, 1), last, {"num_warps": 4, **_OPTIONS}) if splits > 1 else None,
        (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], _segment_stride(segments)),
        (heads, per_kv, packed, rows, keys, keys - rows if causal else keys, width, splits),
        (tile.block_n, block_d) if described else None,
        splits,
    )


def is_describable(tensor: Tensor) -> bool:
    """Return whether the copy engine can read a tensor: 16-bit, each row at a multiple of 16 bytes, not expanded."""
    if tensor.element_size() != 2 or tensor.data_ptr() % 16 or tensor.numel() == 0:
        return False
    return all(stride > 0 and stride * 2 % 16 == 0 for stride in tensor.stride()[:3])


def _described(tensor: Tensor, block_n: int, block_d: int) -> TensorDescriptor:
    """Return a descriptor of keys or values [B, Hkv, N, D] for the copy engine, in blocks of positions."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, 1, block_n, block_d])


def _mass(query, key, total, segments, table, start, scale, chosen, softcap) -> Tensor:
    """Return the mean of alpha over the chosen rows, [B, H, N], computed from the log-sum-exp [B, H, R]."""
    batch, heads, rows, width = query.shape
    keys, per_kv = key.shape[2], heads // key.shape[1]
    tile = config(query.dtype, width, chip(query.device)[0], "mass", softcap is not None)
    share = torch.empty(batch, heads, keys, device=query.device, dtype=torch.float32)
    if not share.numel():
        return share
    some, block_d = chosen is not True, triton.next_power_of_2(width)
    mass_of_keys[(batch * heads, triton.cdiv(keys, tile.block_n))](
        query, key, total, chosen.contiguous().view(torch.uint8) if some else None,
        chosen.sum(-1, dtype=torch.float32) if some else None, share, segments, table, start, scale * _LOG2E,
        (softcap or 1.0) * _LOG2E, *query.stride()[:3], *key.stride()[:3], _segment_stride(segments),
        heads, per_kv, rows, keys, width,
        HAS_CHOSEN=some, HAS_SEGMENTS=segments is not None, HAS_START=start is not None,
        HAS_SOFTCAP=softcap is not None, CHUNK=tile.chunk,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=block_d, EVEN_D=block_d == width,
        PRECISION=tile.precision, num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers, **_OPTIONS,
    )  # fmt: skip
    return share


def _segment_stride(segments: Tensor | None) -> int:
    """Return the stride between the segments of two sequences, or 0 if all sequences share one row of segments."""
    return 0 if segments is None or segments.shape[0] == 1 else segments.stride(0)
