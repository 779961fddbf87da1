"""Every Triton kernel compiles for each chip generation, in each tile that `config` chooses: tensor cores where there
is a product, no spilled register, no more shared memory than the chip has.

Compiling costs one to four seconds a kernel. Default: for each tile the widest head that it serves, with segments,
padding, by-products, soft cap and sinks, which needs most registers; without cap and sinks where these change the tile.
For each kind of kernel also the widest heads of padded width without any of these, and the narrowest ones. The sweep
(see sweep.py) has each of them for each tile; `python tests/test_triton_attention_aot.py` compiles the whole product
and prints a table.
"""

from __future__ import annotations

import itertools
import platform
import re
import sys

import pytest
import torch

if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    pytest.skip("triton is a dependency on Linux x86_64 only", allow_module_level=True)

from mllm_fast.kernels.knockout_attention import triton_attend, triton_kernel, triton_mass
from sweep import also
from triton_aot import SHARED, TENSOR_CORES, Compiled, ahead, compile_kernel, selected

TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
BLOCKS_D = (16, 32, 64, 128, 256)
FIXED = {
    **dict.fromkeys(("query", "key", "value", "output"), "*bf16"),
    **dict.fromkeys(("lse", "counted", "parts", "part_lse"), "*fp32"),
    **dict.fromkeys(("table", "start"), "*i32"),
    **dict.fromkeys(("segments", "chosen"), "*u8"),
    "scale": "fp32",
    "softcap": "fp32",
    "sinks": "*fp32",
}
COUNTS = ("heads", "per_kv", "packed")  # integers that need not be multiples of 16


def build(fn, capability: int, tile: triton_kernel.Config, types: dict | None = None, **constexprs) -> Compiled:
    types = {n: FIXED.get(n, "i32") for n in fn.arg_names if n not in constexprs} | (types or {})
    return compile_kernel(fn, types, constexprs, capability, tile.warps, tile.stages, COUNTS, tile.registers)


def attention_kernel(
    kind: str, dtype: torch.dtype, block_d: int, capability: int, even: bool, full: bool, capped: bool = False
) -> Compiled:
    """`attend` or `mass` as the launch code would call it; `full`: with segments, padding and by-products; `capped`:
    with a soft cap and sinks."""
    tile = triton_kernel.config(dtype, block_d, divmod(capability, 10), kind, capped)
    absent = {} if full else dict.fromkeys(("segments", "table", "start"))
    flags = {"HAS_SEGMENTS": full, "HAS_START": full, "PRECISION": tile.precision, "BLOCK_D": block_d}
    flags |= {"CHUNK": tile.chunk, "EVEN_D": even, "HAS_SOFTCAP": capped}
    types = dict.fromkeys(("query", "key"), TYPES[dtype])
    if kind == "mass":
        fn, types["output"] = triton_mass.mass, "*fp32"
        flags["HAS_CHOSEN"] = full
        absent |= {} if full else dict.fromkeys(("chosen", "counted"))
    else:
        fn = triton_attend.attend
        types |= dict.fromkeys(("value", "output"), TYPES[dtype])
        if kind == "described":
            block = f"tensordesc<{TYPES[dtype][1:]}[1,1,{tile.block_n},{block_d}]>"
            types |= {"key": block, "value": block}
        flags |= {"WITH_LSE": full, "PACKED": full and kind == "decode", "SPLIT": full, "GROUPED": full}
        flags |= {"DESCRIBED": kind == "described", "HAS_SINKS": capped}
        absent |= {} if capped else {"sinks": None}
        absent |= {} if full else {"lse": None}
    flags |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    return build(fn, capability, tile, types, **flags, **absent)


def check(made: Compiled, capability: int, products: bool) -> None:
    assert made.spills == 0, f"{made.spills} bytes spilled at {made.registers} registers"
    assert made.shared <= SHARED[capability]
    if capability == 80:
        assert made.shared <= 99 << 10, "consumer chips of the same generation have 99 KiB"
    if products:
        assert any(name in made.ptx for name in TENSOR_CORES[capability])


def uses_tensor_cores(kind: str, dtype: torch.dtype, block_d: int, capability: int) -> bool:
    return triton_kernel.config(dtype, block_d, divmod(capability, 10), kind).precision != "ieee"


def has_kind(kind: str, dtype: torch.dtype, capability: int, block_d: int) -> bool:
    if kind == "described":
        return dtype.itemsize == 2 and capability // 10 in triton_kernel._DESCRIBED
    return block_d <= max(triton_kernel._TILES[kind][dtype.itemsize])


def default_cases():
    for kind, dtype, capability in itertools.product(triton_kernel.KINDS, (torch.bfloat16, torch.float32), SHARED):
        widths = [d for d in BLOCKS_D if has_kind(kind, dtype, capability, d)]
        served = {triton_kernel.config(dtype, d, divmod(capability, 10), kind): d for d in widths}
        for tile, block_d in served.items():
            capped, full, bare = (
                (kind, dtype, block_d, capability, *flags)
                for flags in ((True, True, True), (True, True, False), (False, False, False))
            )
            same_tile = tile == triton_kernel.config(dtype, block_d, divmod(capability, 10), kind, capped=True)
            yield from (full,) if capability == 100 else (capped, *also(full)) if same_tile else (capped, full)
            yield from (bare,) if block_d == max(widths) else also(bare)
        if widths:
            yield kind, dtype, 16, capability, True, True, False
    for capability in SHARED:
        yield "prefill", torch.float16, 128, capability, True, True, False


NAMES = ("kind", "dtype", "block_d", "capability", "even", "full", "capped")


@pytest.fixture(scope="module")
def compiled(request):
    cases = [tuple(given[name] for name in NAMES) for _, given in selected(request, "test_attention_kernels")]
    with ahead(attention_kernel, cases) as build:
        yield build


@pytest.mark.parametrize(NAMES, list(dict.fromkeys(default_cases())))
def test_attention_kernels(compiled, kind, dtype, block_d, capability, even, full, capped):
    made = compiled(kind, dtype, block_d, capability, even, full, capped)
    check(made, capability, uses_tensor_cores(kind, dtype, block_d, capability))
    if kind in ("prefill", "described") and dtype.itemsize == 2:
        assert TENSOR_CORES[capability][-1] in made.ptx, "the chip's own matrix instructions"
        # every wait is for all products: the copy that is begun next writes where the last but one read
        assert set(re.findall(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)", made.ptx)) <= {"0"}


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("block_d", [16, 256])
def test_combine(block_d, capability):
    flags = {"HAS_SINKS": True, "WITH_LSE": True, "MAX_SPLITS": triton_kernel.MAX_SPLITS, "BLOCK_D": block_d}
    check(build(triton_attend.combine, capability, triton_kernel.Config(0, 0, 4, 3), **flags), capability, False)


@pytest.mark.parametrize(
    "fn", [triton_attend.attend, triton_attend.combine, triton_mass.mass], ids=lambda fn: fn.__name__
)
def test_a_new_length_compiles_nothing(fn):
    special = {p.name for p in fn.params if p.is_constexpr or not p.do_not_specialize}
    assert not special & {"rows", "keys", "splits", "segment_stride"}


def main() -> None:
    """The whole product, a line each; ends with an error at the first that fails."""
    flags = (False, True)
    for case in itertools.product(triton_kernel.KINDS, TYPES, BLOCKS_D, SHARED, flags, flags, flags):
        kind, dtype, block_d, capability, even, full, capped = case
        if not has_kind(kind, dtype, capability, block_d):
            continue
        made = attention_kernel(*case)
        print(f"sm_{capability} {kind:8}{TYPES[dtype][1:]:5}{block_d:4} {'even' if even else 'odd ':5}"
              f"{'full' if full else 'bare':5}{'capped' if capped else '':7}{made.registers:4} registers"
              f"{made.spills:5} spilled{made.shared:7} shared", flush=True)  # fmt: skip
        check(made, capability, uses_tensor_cores(kind, dtype, block_d, capability))


if __name__ == "__main__":
    main()
