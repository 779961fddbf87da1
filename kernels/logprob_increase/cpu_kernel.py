"""Hands the log-sum-exp to the compiled extension. Same contract as torch_kernel.log_sum_exp."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..dispatch import cpu_extension, instruction_set
from .base import Base
from .base import increase as increase_by_group
from .operators import Operators

_LOG2E = 1 / math.log(2)
_NEVER = -745.0  # a log-probability below the smallest float64: the word cannot be said


def increase(base: Base, writes: Tensor, operands: Tensor | Operators, shift: Tensor | None, source: Tensor) -> Tensor:
    """See `base.increase`."""
    return increase_by_group(log_sum_exp, base, writes, operands, shift, source)


def log_sum_exp(
    writes: Tensor,
    operand: Tensor,
    base: Tensor,
    lean: Tensor | None,
    shift: Tensor | None,
    raw: Tensor | None,
    cap: float | None,
    isa: str | None = None,
) -> Tensor:
    """See torch_kernel.log_sum_exp; writes, base, lean, shift and raw are float32, the operand float32 or
    bfloat16. `isa` picks an instruction set (tests), else the processor's best."""
    groups, rows, depth = writes.shape
    # the kernel works in powers of two; under a cap it needs the increase itself, in nats
    unit = 1.0 if cap is not None else _LOG2E
    writes = (writes * unit).contiguous()
    shift = None if shift is None else (shift * unit).contiguous()
    # masked words: kept apart from the running peak, which they would drag far from all others
    base = (base * _LOG2E).masked_fill(base < _NEVER, -math.inf).contiguous()
    operand, lean = operand.contiguous(), None if lean is None else lean.contiguous()
    raw = None if raw is None else raw.contiguous()
    start = torch.arange(groups + 1) * rows
    out = writes.new_empty(groups, rows)
    if out.numel():
        extension, _ = cpu_extension()
        extension.log_sum_exp(  # type: ignore[union-attr]
            writes=writes.data_ptr(),
            operand=operand.data_ptr(),
            bfloat16=operand.dtype == torch.bfloat16,
            group_start=start.data_ptr(),
            base=base.data_ptr(),
            lean=_address(lean),
            shift=_address(shift),
            raw=_address(raw),
            cap=cap or 0.0,
            rows=groups * rows,
            vocab=len(operand),
            depth=depth,
            groups=groups,
            out=out.data_ptr(),
            threads=torch.get_num_threads(),
            isa=isa or instruction_set(),
        )
    return out / _LOG2E


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
