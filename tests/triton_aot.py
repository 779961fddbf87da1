"""Compiles Triton kernels for GPUs that are not there, and reads what the compiler made of them."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# bytes of shared memory that a program may have, by capability (CUDA C++ programming guide, table of capabilities)
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
# the tensor cores' instructions; newer chips also have the older ones
TENSOR_CORES = {
    80: ("mma.sync",),
    90: ("mma.sync", "wgmma.mma_async"),
    100: ("mma.sync", "tcgen05.mma"),
}


class Compiled(NamedTuple):
    """PTX, cubin, registers a thread, bytes spilled a thread, bytes of shared memory a program."""

    ptx: str
    cubin: bytes
    registers: int
    spills: int
    shared: int


def selected(request: pytest.FixtureRequest, *tests: str) -> Iterator[tuple[str, dict]]:
    """Names and parameters of the tests of these names that this run will make, of the module that asks."""
    for item in request.session.items:
        if item.module is request.module and item.originalname in tests:
            yield item.originalname, item.callspec.params


@contextmanager
def ahead(build: Callable[..., Compiled], cases: Iterable[tuple]) -> Iterator[Callable[..., Compiled]]:
    """`build`, whose results for these arguments are made by as many processes as there are cores, in order."""
    cases, cores = list(dict.fromkeys(cases)), os.cpu_count() or 1
    if min(len(cases), cores) < 2:
        yield build
        return
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn")) as pool:
        made = {case: pool.submit(build, *case) for case in cases}
        try:
            yield lambda *case: made[case].result()
        finally:
            pool.shutdown(cancel_futures=True)


def compile_kernel(
    fn: triton.JITFunction,
    signature: dict[str, str],
    constexprs: dict,
    capability: int,
    num_warps: int,
    num_stages: int,
    unaligned: tuple[str, ...] = (),
    most_registers: int | None = None,
) -> Compiled:
    """Compiles `fn` as a launch would.

    Args:
        signature: type of each argument that is no constexpr, such as "*bf16" or "i32"; in any order, and
            with names that this kernel does not have.
        constexprs: the others, and arguments that are None.
        capability: 80, 90 or 100.
        unaligned: integer arguments that are no multiples of 16. Pointers are multiples of 16 bytes, and so are
            integers but those of `do_not_specialize`.
        most_registers: that a thread may have, the launch's `maxnreg`.
    """
    unknown = set(fn.arg_names) - signature.keys() - constexprs.keys()
    if unknown or signature.keys() & constexprs.keys():
        raise ValueError(f"{fn.__name__}: arguments missing or given twice: {sorted(unknown)}")
    plain = {p.name for p in fn.params if p.do_not_specialize} | set(unaligned)
    types = {name: signature.get(name, "constexpr") for name in fn.arg_names}
    aligned = [i for i, (n, t) in enumerate(types.items()) if t[0] == "*" or (t in ("i32", "i64") and n not in plain)]
    attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True, "maxnreg": most_registers}
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True  # a cached result tests nothing
        source = ASTSource(fn=fn, signature=types, constexprs=constexprs, attrs=attrs)
        kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spills = _usage(kernel.asm["cubin"])
    return Compiled(kernel.asm["ptx"], kernel.asm["cubin"], registers, spills, kernel.metadata.shared)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack and local memory, by the cuobjdump that Triton brings along."""
    tool = triton.knobs.nvidia.cuobjdump.path
    if not Path(tool).is_file():
        raise FileNotFoundError(f"cuobjdump is missing at {tool}: reinstall triton, or set TRITON_CUOBJDUMP_PATH")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        report = subprocess.run([tool, "-res-usage", str(file)], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no usage: {report}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local
