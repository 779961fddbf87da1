"""Selection of the backend that computes an op, from the device and dtype of its tensors.

Every op follows one rule. A backend that the caller names is never replaced: it is used, or the call raises. With
"auto", a GPU uses the Triton kernels and the CPU uses the compiled kernels, each for the dtypes they support, unless
torch was measured to be faster on this processor (`kernels.paths`); all other cases use plain torch. On a GPU without
Triton, "auto" raises for these dtypes; the caller has to choose plain torch explicitly.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from types import ModuleType

import torch

from . import paths
from .extension import cpu_extension

BACKENDS = ("auto", "triton", "cpu", "torch")
# op -> backend -> dtypes; "torch" takes every floating dtype and is the only backend where there is no entry
_DTYPES: dict[str, dict[str, tuple[torch.dtype, ...]]] = {
    "knockout_attention": {
        "triton": (torch.float16, torch.bfloat16, torch.float32),
        "cpu": (torch.float32, torch.bfloat16),
    },
    "skinny_linear": {"cpu": (torch.float32, torch.bfloat16)},
    "decoder_layers": {"cpu": (torch.float32, torch.bfloat16)},
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


# ops whose calls are all computed in one way; the others choose by the call
_WHOLE = ("logprob_increase", "weighted_values")

# op -> note in the report on the calls that the C++ kernel leaves to torch
_LEFT = {
    "skinny_linear": " and few rows of a large weight",
    "decoder_layers": " and sizes that are multiples of 16",
}


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which numbers of a floating dtype are summed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@cache
def triton_missing() -> str:
    """Import Triton and return the reason why it cannot be used, or "" if it can."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton is not installed or does not load ({error}); `pip install triton`"
    return ""


def interpreted() -> bool:
    """Return whether Triton runs its kernels on the CPU (TRITON_INTERPRET=1, which the tests set)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def choose(device: torch.device, dtype: torch.dtype, requested: str = "auto", *, op: str) -> str:
    """Return the backend of `op` for operands on `device` of type `dtype`.

    Args:
        device: Device of the operands.
        dtype: Dtype of the operands.
        requested: One of `BACKENDS`; "auto" applies the rule of this module.
        op: Name of the op.

    Returns:
        "triton", "cpu" or "torch".

    Raises:
        ValueError: `requested` is unknown, or it cannot serve this device and dtype, or the device is a GPU and
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
    return "torch" if _unfit("cpu", device, dtype, op) or _slower(op, dtype) else "cpu"


def _slower(op: str, dtype: torch.dtype) -> bool:
    """Return whether torch computes every call of an op faster than the compiled kernel on this processor."""
    return op in _WHOLE and paths.path_of(op, dtype) == "torch"


def forget() -> None:
    """Let the next call choose anew, after a calibration."""
    paths.forget()
    choose.cache_clear()
    kernel_of.cache_clear()


@cache
def kernel_of(op: str, device: torch.device, dtype: torch.dtype, requested: str) -> ModuleType:
    """Return the module that computes `op` with the backend that `choose` returns; the first call imports it."""
    backend = choose(device, dtype, requested, op=op)
    return importlib.import_module(f".{op}.{backend}_kernel", __package__)


def _unfit(backend: str, device: torch.device, dtype: torch.dtype, op: str) -> str:
    """Return the reason why the backend "triton" or "cpu" cannot serve, or "" if it can."""
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
    """Return a dict from the name of each op to one line that says which backends it uses on this machine and why."""
    return {op: _report(op) for op in _DTYPES}


def _report(op: str) -> str:
    lines = []
    if torch.cuda.is_available():
        chip = f"{torch.cuda.get_device_name()}, sm_{''.join(map(str, torch.cuda.get_device_capability()))}"
        missing = triton_missing()
        if op == "decoder_layers":
            lines.append(f"GPU ({chip}): the model's own forward")
        elif "triton" not in _DTYPES[op]:
            lines.append(f"GPU ({chip}): torch's own matrix products")
        else:
            lines.append(f"GPU: refused, {missing}" if missing else f"GPU ({chip}): Triton for {_names(op, 'triton')}")
    extension, reason = cpu_extension()
    if "cpu" not in _DTYPES[op]:
        lines.append("CPU: plain torch (no C++ kernel: it only moves memory)")
    elif extension is None:
        lines.append(f"CPU: plain torch ({reason})")
    else:
        lines.append(f"CPU: C++ for {_names(op, 'cpu')}{_LEFT.get(op, '')}, {_chosen(op)}; plain torch for other types")
    return "; ".join(lines)


def _chosen(op: str) -> str:
    """Return which paths compute the calls of an op, and whence this is known."""
    found, kinds = paths.paths(), {}
    for use in paths.USES:
        name, kind, dtype = use.split("/")
        if name == op:
            kinds[dtype if kind == "all" else f"{kind} in {dtype}"] = found.path[use]
    ways = list(dict.fromkeys(kinds.values()))
    if len(ways) == 1:
        said = ways[0]
    else:
        said = ", ".join(f"{way} ({', '.join(k for k, one in kinds.items() if one == way)})" for way in ways)
    if op == "skinny_linear":
        said += f", {' and '.join(f'{low} to {high} rows in {name}' for name, (low, high) in found.rows.items())}"
    return f"{said} ({'measured here' if found.source == 'measured' else 'by the table; mllm-fast tune measures'})"


def _names(op: str, backend: str) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES[op][backend])
