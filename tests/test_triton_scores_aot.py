"""Compiles the Triton kernels of the scores for GPUs that are not there: tensor cores, no spills, shared memory.

What changes the code is the type of the operands, the tile that `config` picks for it, whether the depth fills the
tile, and the two flags. bfloat16 and float16 differ in one letter of the product's instruction, so float16 is
compiled at one depth; sizes of the problem are arguments, not constants. Both flags need most registers, so the flags
alone and none are compiled at one depth; the sweep (see sweep.py) has them at more.
"""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")
from mllm_fast.kernels.logprob_increase import triton_kernel, triton_moments, triton_rounding, triton_tiles
from mllm_fast.kernels.topk_compaction import triton_kernel as topk
from mllm_fast.kernels.weighted_values import triton_kernel as weighted
from sweep import also
from triton_aot import ahead, compile_kernel, selected

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
SHARED = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
PRODUCTS = {80: "mma.sync", 86: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
LARGE = [80, 90, 100]
BOTH = [torch.bfloat16, torch.float32]
SCORES = {
    **dict.fromkeys(("factor", "shift", "base", "lean", "before", "picked", "sums"), "*fp32"),
    **dict.fromkeys(("operators", "source", "tokens", "order"), "*i64"),
    **dict.fromkeys(("groups", "rows", "vocab", "share", "splits"), "i32"),
    "gain": "fp32",
}
LISTED = {**dict.fromkeys(("first", "second"), "*fp32"), **dict.fromkeys(("order", "counts"), "*i32")}
LISTED |= {"shares": "i32", "rounding": "fp32"}
FACTORED = [
    *((torch.bfloat16, depth, "own cap") for depth in (16, 32, 64, 128, 256, 7, 40, 300, *also(8, 80, 129, 200, 512))),
    *((torch.bfloat16, 128, flags) for flags in ("", "own", "cap")),
    *((torch.bfloat16, depth, "") for depth in also(16, 32, 64, 256)),
    *((torch.float16, 128, flags) for flags in ("own cap", *also(""))),
    *((torch.float32, depth, "own cap") for depth in (16, 32, 128, 40)),
    *((torch.float32, depth, "") for depth in (128, *also(16, 32, 40))),
    *((torch.bfloat16, depth, "listed") for depth in (80, 128)),
]
MOMENTS = [*((torch.bfloat16, depth) for depth in (16, 80, 128)), (torch.float16, 128)]
DIRECT = [
    *((torch.bfloat16, 4096, flags) for flags in ("", "own", "cap", "own cap")),
    *((torch.bfloat16, 200, flags) for flags in ("own cap", *also(""))),
    *((torch.float16, 4096, flags) for flags in ("own cap", *also(""))),
    *((torch.float32, 4096, flags) for flags in ("", "own cap")),
    *((torch.float32, 200, flags) for flags in ("own cap", *also(""))),
]


def scores_kernel(way: str, dtype: torch.dtype, depth: int, flags: str, capability: int):
    listed = flags == "listed"
    tile = triton_kernel.config(dtype, depth, way, divmod(capability, 10), own="own" in flags, cap="cap" in flags)
    constants = {
        "DEPTH": depth,
        "BLOCK_R": tile.block_r,
        "BLOCK_V": tile.block_v,
        "BLOCK_K": tile.block_k,
        "OWN": "own" in flags,
        "CAP": "cap" in flags,
    }
    if way == "direct":
        constants["BAND"] = triton_kernel.BAND
    else:
        constants["LISTED"] = listed
    signature = SCORES | (LISTED if way == "factored" else {}) | {"writes": TYPES[dtype], "operand": TYPES[dtype]}
    fn = getattr(triton_tiles, way)
    sizes = tile.warps, tile.stages
    return compile_kernel(fn, signature, constants, capability, *sizes, most_registers=tile.registers)


def moments_kernel(way: str, dtype: torch.dtype, depth: int, flags: str, capability: int):
    constants: dict = {"DEPTH": depth, "BLOCK_K": triton_kernel.block_k(depth)}
    signature = SCORES | LISTED | {"writes": TYPES[dtype]}
    if way == "expand":
        constants["BLOCK_R"] = triton_moments.BLOCK_R
        return compile_kernel(triton_moments.expand, signature, constants, capability, triton_moments.WARPS, 3)
    tile = triton_moments.config(divmod(capability, 10))
    constants["BLOCK_V"] = tile.block_v
    sizes = tile.warps, tile.stages
    return compile_kernel(
        triton_moments.moments, signature, constants, capability, *sizes, most_registers=tile.registers
    )


def built(way: str, *case):
    return (moments_kernel if way in ("moments", "expand") else scores_kernel)(way, *case)


@pytest.fixture(scope="module")
def compiled(request):
    ways = {"test_factored": "factored", "test_direct": "direct", "test_moments": "moments", "test_expand": "expand"}
    cases = [
        (ways[test], given["dtype"], given["depth"], given.get("flags", ""), given["capability"])
        for test, given in selected(request, *ways)
    ]
    with ahead(built, cases) as build:
        yield build


def check(kernel, capability: int) -> None:
    print(f"registers {kernel.registers}, shared {kernel.shared}")
    assert PRODUCTS[capability] in kernel.ptx, "no tensor cores"
    assert kernel.shared <= SHARED[capability]
    if capability in LARGE:
        assert kernel.spills == 0


@pytest.mark.parametrize("capability", LARGE)
@pytest.mark.parametrize(("dtype", "depth", "flags"), FACTORED)
def test_factored(compiled, dtype, depth, flags, capability):
    kernel = compiled("factored", dtype, depth, flags, capability)
    check(kernel, capability)
    # the operator's rows are read 8 or 16 bytes at a time where they begin at a multiple of that, though its address
    # comes from a table
    wide = re.search(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], 0x(8|10)", kernel.ptx)
    assert bool(wide) == (depth * dtype.itemsize % 8 == 0)


@pytest.mark.parametrize("capability", LARGE)
@pytest.mark.parametrize(("dtype", "depth", "flags"), DIRECT)
def test_direct(compiled, dtype, depth, flags, capability):
    check(compiled("direct", dtype, depth, flags, capability), capability)


@pytest.mark.parametrize("capability", LARGE)
@pytest.mark.parametrize(("dtype", "depth"), MOMENTS)
def test_moments(compiled, dtype, depth, capability):
    """Where products may run on while the program does, Triton 3.6 and 3.9 overwrite their operand: each is waited for,
    none is left to run."""
    kernel = compiled("moments", dtype, depth, "", capability)
    check(kernel, capability if depth > 32 else 80)  # what is narrower has the older instruction everywhere
    assert set(re.findall(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)", kernel.ptx)) <= {"0"}


@pytest.mark.parametrize("capability", LARGE)
@pytest.mark.parametrize(("dtype", "depth"), MOMENTS)
def test_expand(compiled, dtype, depth, capability):
    kernel = compiled("expand", dtype, depth, "", capability)
    assert "mma.sync" in kernel.ptx, "no tensor cores"
    assert kernel.shared <= SHARED[capability]
    assert kernel.spills == 0


@pytest.mark.parametrize("capability", [86, 120])
@pytest.mark.parametrize(
    ("way", "depth", "dtype"),
    [
        *((way, depth, dtype) for way, depth in (("factored", 256), ("direct", 4096)) for dtype in BOTH),
        ("moments", 128, torch.bfloat16),
    ],
)
def test_gpus_of_little_shared_memory(way, depth, dtype, capability):
    """They are served by the same tiles; two or four registers may spill there."""
    check(built(way, dtype, depth, "", capability), capability)


@pytest.mark.parametrize("capability", LARGE)
@pytest.mark.parametrize(("dtype", "depth"), [(torch.bfloat16, 128), (torch.float16, 4096), (torch.float32, 80)])
@pytest.mark.parametrize("flags", ["", "gain shift"])
def test_rounding(dtype, depth, flags, capability):
    signature = {"values": "*fp32", "rounded": TYPES[dtype], "source": "*i64", "unit": "fp32"}
    signature |= dict.fromkeys(("gain", "after", "shift", "factor"), "*fp32") | dict.fromkeys(("count", "rows"), "i32")
    constants = {
        "DEPTH": depth,
        "HAS_GAIN": "gain" in flags,
        "HAS_SHIFT": "shift" in flags,
        "BLOCK_R": triton_rounding.BLOCK_R,
        "BLOCK_K": triton_rounding.BLOCK_K,
    }
    kernel = compile_kernel(triton_rounding.round_rows, signature, constants, capability, triton_rounding.WARPS, 3)
    assert kernel.spills == 0


@pytest.mark.parametrize("capability", LARGE)
@pytest.mark.parametrize("always", [False, True])
def test_ranks(always, capability):
    signature = {
        "mass": "*fp32",
        "candidates": "*u8",
        "always": "*u8",
        "kept": "*i8",
        "positions": "i32",
        "keep": "i32",
    }
    constants = {"ALWAYS": always, "BLOCK_I": topk.BLOCK_I, "BLOCK_J": topk.BLOCK_J}
    kernel = compile_kernel(topk.rank, signature, constants, capability, topk.WARPS, 3)
    assert kernel.spills == 0


@pytest.mark.parametrize("capability", LARGE)
def test_places(capability):
    signature = {"kept": "*i8", "chosen": "*i64", "positions": "i32", "count": "i32"}
    kernel = compile_kernel(topk.place, signature, {"BLOCK_N": topk.BLOCK_N}, capability, topk.WARPS, 3)
    assert kernel.spills == 0


@pytest.mark.parametrize("capability", LARGE)
@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 128), (torch.bfloat16, 72), (torch.float32, 256)])
@pytest.mark.parametrize("aligned", [False, True])
def test_copies(dtype, width, aligned, capability):
    signature = {"sources": "*i64", "chosen": "*i64", "gathered": TYPES[dtype], "heads": "i32", "count": "i32"}
    vector = 16 // dtype.itemsize if aligned else 1
    block = 1 << (width - 1).bit_length()
    constants = {"WIDTH": width, "BLOCK_M": topk.BLOCK_M, "BLOCK_D": block, "VECTOR": vector}
    kernel = compile_kernel(topk.copy, signature, constants, capability, topk.WARPS, 3)
    assert kernel.spills == 0
    assert ("ld.global.v4.b32" in kernel.ptx) == aligned, "16 bytes at a time"


@pytest.mark.parametrize("capability", LARGE)
@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.bfloat16, 128), (torch.float16, 64), (torch.bfloat16, 72), (torch.float32, 256)]
)
@pytest.mark.parametrize("aligned", [False, True])
def test_weighted_values(dtype, width, aligned, capability):
    signature = {"query": TYPES[dtype], "places": "*i64", "count": "i32"}
    signature |= dict.fromkeys(("scales", "scores", "out"), "*fp32")
    vector = 16 // dtype.itemsize if aligned else 1
    block = 1 << (width - 1).bit_length()
    constants = {"WIDTH": width, "BLOCK_N": weighted.BLOCK_N, "BLOCK_D": block, "VECTOR": vector}
    kernel = compile_kernel(weighted.weigh, signature, constants, capability, weighted.WARPS, 3)
    assert kernel.spills == 0
    assert kernel.shared <= SHARED[capability]
