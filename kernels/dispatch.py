"""From a tensor's device and dtype to the backend that computes: one rule for every op.

An explicit choice is never replaced: it serves or it raises. Without a choice ("auto") the rule is:
on the CPU the compiled kernels for the dtypes they have, else plain torch; elsewhere plain torch.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch

BACKENDS = ("auto", "cpu", "torch")
_CPU_DTYPES = (torch.float32, torch.bfloat16)


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


def choose(device: torch.device, dtype: torch.dtype, requested: str = "auto") -> str:
    """The backend for operands on `device` of type `dtype`.

    Raises:
        ValueError: `requested` is unknown, or cannot serve this device and dtype.
    """
    if requested not in BACKENDS:
        raise ValueError(f"backend is one of {', '.join(BACKENDS)}, got {requested!r}")
    unfit = _why_not_cpu(device, dtype)
    if requested == "auto":
        return "torch" if unfit else "cpu"
    if requested == "cpu" and unfit:
        raise ValueError(f"backend 'cpu' cannot be used: {unfit}; use 'torch' or 'auto'")
    return requested


def _why_not_cpu(device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cpu":
        return f"the tensors are on {device}"
    if dtype not in _CPU_DTYPES:
        return f"it takes float32 and bfloat16 operands, got {str(dtype).removeprefix('torch.')}"
    return cpu_extension()[1]


def backend_report() -> dict[str, str]:
    """What each op uses on this machine, and why: op name -> one line."""
    extension, reason = cpu_extension()
    if extension is None:
        line = f"plain torch: {reason}"
    else:
        sets = extension.instruction_sets()
        line = f"C++, {sets[0]} (this processor has {', '.join(sets)})"
    return {"logprob_increase": line}
