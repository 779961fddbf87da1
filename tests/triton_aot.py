"""Compiles a Triton kernel ahead of time for a GPU that need not be there, and reads what the assembler used."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Compiled(NamedTuple):
    """The assembly, the binary, registers a thread, spilled bytes a thread, shared bytes a block."""

    ptx: str
    cubin: bytes
    registers: int
    spills: int
    shared: int


def compile_kernel(
    fn: Any,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    capability: int,
    num_warps: int,
    num_stages: int,
) -> Compiled:
    """`fn` for sm_`capability`; `signature` names the type of each argument that is not in `constexprs`. Pointers
    count as aligned to 16 bytes, as a tensor's own memory is."""
    names = {name: "constexpr" if name in constexprs else signature[name] for name in fn.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(fn.arg_names) if names[name].startswith("*")
    }
    source = ASTSource(fn=fn, signature=names, constexprs=constexprs, attrs=aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    numbers = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    spills = numbers["STACK"] + numbers["LOCAL"]
    return Compiled(kernel.asm["ptx"], kernel.asm["cubin"], numbers["REG"], spills, kernel.metadata.shared)
