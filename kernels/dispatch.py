"""From a tensor's device and dtype to the backend that computes: one rule for every op.

An explicit choice is never replaced: it serves or it raises. Without a choice ("auto") the rule is: on a GPU the
Triton kernels for the dtypes they have, on the CPU the compiled ones for theirs, elsewhere plain torch. A GPU machine
without Triton is told so; it is not served by plain torch unless that is asked for.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from types import ModuleType

import torch

BACKENDS = ("auto", "triton", "cpu", "torch")
# op -> backend -> dtypes; "torch" takes every floating dtype, and no entry means that plain torch serves alone
_DTYPES: dict[str, dict[str, tuple[torch.dtype, ...]]] = {
    "knockout_attention": {
        "triton": (torch.float16, torch.bfloat16, torch.float32),
        "cpu": (torch.float32, torch.bfloat16),
    },
    "few_row_linear": {"cpu": (torch.float32, torch.bfloat16)},
    "logprob_increase": {
        "triton": (torch.float16, torch.bfloat16, torch.float32),
        "cpu": (torch.float32, torch.bfloat16),
    },
    "topk_compaction": {"triton": (torch.float16, torch.bfloat16, torch.float32)},
    "weighted_values": {
        "triton": (torch.float16, torch.bfloat16, torch.float32),
        "cpu": (torch.float32, torch.bfloat16),
    },
}


# what the C++ kernel leaves to torch
_LEFT = {"few_row_linear": "; it serves few rows of a large weight, torch the others"}


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """What sums of numbers of a floating type are made in: float32, of float64 that."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@cache
def cpu_extension() -> tuple[ModuleType | None, str]:
    """The compiled module and "", or None and the reason why it is not there."""
    try:
        return importlib.import_module("._cpu", __package__), ""
    except ImportError as error:
        return None, f"the C++ extension is not built or does not load ({error})"


@cache
def instruction_set() -> str:
    """The best instruction set that the compiled kernels can use on this processor."""
    extension, reason = cpu_extension()
    if extension is None:
        raise RuntimeError(reason)
    return extension.instruction_sets()[0]


@cache
def triton_missing() -> str:
    """Why Triton cannot be used at all; "" if it can. Imports it."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton is not installed or does not load ({error}); `pip install triton`"
    return ""


def interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU (TRITON_INTERPRET=1, as the tests do)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def choose(device: torch.device, dtype: torch.dtype, requested: str = "auto", *, op: str) -> str:
    """The backend of `op` for operands on `device` of type `dtype`.

    Raises:
        ValueError: `requested` is unknown, or cannot serve this device and dtype; or the device is a GPU and
            Triton is missing.
    """
    if requested not in BACKENDS:
        raise ValueError(f"backend is one of {', '.join(BACKENDS)}, got {requested!r}")
    if requested == "torch":
        return "torch"
    if requested != "auto":
        unfit = _unfit(requested, device, dtype, op)
        if unfit:
            raise ValueError(f"backend {requested!r} cannot be used: {unfit}; use 'torch' or 'auto'")
        return requested
    if device.type == "cuda" and dtype in _DTYPES[op].get("triton", ()):
        if triton_missing():
            raise ValueError(f"{op} on {device}: {triton_missing()}, or choose backend='torch'")
        return "triton"
    return "torch" if _unfit("cpu", device, dtype, op) else "cpu"


@cache
def kernel_of(op: str, device: torch.device, dtype: torch.dtype, requested: str) -> ModuleType:
    """The module that computes `op`: the backend that `choose` names, loaded when it is first needed."""
    backend = choose(device, dtype, requested, op=op)
    return importlib.import_module(f".{op}.{backend}_kernel", __package__)


def _unfit(backend: str, device: torch.device, dtype: torch.dtype, op: str) -> str:
    """Why a compiled backend cannot serve, "" if it can."""
    accepted = _DTYPES[op].get(backend)
    if accepted is None:
        return f"{op} has no kernel of that kind"
    right_device = device.type == "cpu" if backend == "cpu" else device.type == "cuda" or interpreted()
    if not right_device:
        return f"the tensors are on {device}"
    if dtype not in accepted:
        names = [str(one).removeprefix("torch.") for one in (*accepted, dtype)]
        return f"it takes {', '.join(names[:-1])} operands, got {names[-1]}"
    return cpu_extension()[1] if backend == "cpu" else triton_missing()


def backend_report() -> dict[str, str]:
    """What each op uses on this machine, and why: op name -> one line."""
    return {op: _report(op) for op in _DTYPES}


def _report(op: str) -> str:
    lines = []
    if torch.cuda.is_available():
        chip = f"{torch.cuda.get_device_name()}, sm_{''.join(map(str, torch.cuda.get_device_capability()))}"
        missing = triton_missing()
        if "triton" not in _DTYPES[op]:
            lines.append(f"GPU ({chip}): torch's own matrix products")
        else:
            lines.append(f"GPU: refused, {missing}" if missing else f"GPU ({chip}): Triton for {_names(op, 'triton')}")
    extension, reason = cpu_extension()
    if "cpu" not in _DTYPES[op]:
        lines.append("CPU: plain torch (no C++ kernel: it only moves memory)")
    elif extension is None:
        lines.append(f"CPU: plain torch ({reason})")
    else:
        sets = extension.instruction_sets()
        lines.append(
            f"CPU: C++ for {_names(op, 'cpu')}, {sets[0]} (this processor has {', '.join(sets)});"
            f" plain torch for other types{_LEFT.get(op, '')}"
        )
    return "; ".join(lines)


def _names(op: str, backend: str) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES[op][backend])
