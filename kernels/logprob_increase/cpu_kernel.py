"""Hands the log-sum-exp to the compiled extension. Same contract as torch_kernel.log_sum_exp."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import cpu_extension, instruction_set
from .base import Base
from .operators import Operators, held_together

_LOG2E = 1 / math.log(2)
_MADE_BYTES = 1 << 26  # of operators outside the cache that one call keeps alive
_NEVER = -745.0 * _LOG2E  # a log-probability below the smallest float64: the word cannot be said


def increase(base: Base, writes: Tensor, operands: Tensor | Operators, shift: Tensor | None, source: Tensor) -> Tensor:
    """See `torch_kernel.increase`."""
    if isinstance(operands, Tensor):
        total = log_sum_exp(writes, operands, *base.of(source, shift), base.cap)
        return base.explained(writes, operands[base.tokens[source]], shift, source) - total
    out = writes.new_empty(writes.shape[:2])
    for part, held in held_together(operands, _MADE_BYTES):
        lift = None if shift is None else shift[part]
        total = log_sum_exp(writes[part], held, *base.of(source[part], lift), base.cap)
        rows = torch.stack([one[token] for one, token in zip(held, base.tokens[source[part]].tolist(), strict=True)])
        out[part] = base.explained(writes[part], rows, lift, source[part]) - total
    return out


def log_sum_exp(
    writes: Tensor,
    operand: Tensor | list[Tensor],
    base: Tensor,
    lean: Tensor | None,
    shift: Tensor | None,
    raw: Tensor | None,
    cap: float | None,
    isa: str | None = None,
) -> Tensor:
    """See torch_kernel.log_sum_exp; writes, base, lean, shift and raw are float32, the operand float32 or
    bfloat16, or a list with one for each group. `isa` picks an instruction set (tests), else the processor's best."""
    groups, rows, depth = writes.shape
    # the kernel works in powers of two; under a cap it needs the increase itself, in nats
    unit = 1.0 if cap is not None else _LOG2E
    writes = (writes * unit).contiguous()
    shift = None if shift is None else (shift * unit).contiguous()
    # masked words: kept apart from the running peak, which they would drag far from all others
    base = F.threshold(base * _LOG2E, _NEVER, -math.inf).contiguous()
    lean = None if lean is None else lean.contiguous()
    each = [one.contiguous() for one in (operand if isinstance(operand, list) else [operand])]
    raw = None if raw is None else raw.contiguous()
    out = writes.new_empty(groups, rows)
    if out.numel():
        extension, _ = cpu_extension()
        extension.log_sum_exp(  # type: ignore[union-attr]
            writes=writes.data_ptr(),
            operands=[one.data_ptr() for one in each],
            bfloat16=each[0].dtype == torch.bfloat16,
            base=base.data_ptr(),
            lean=_address(lean),
            shift=_address(shift),
            raw=_address(raw),
            cap=cap or 0.0,
            rows=rows,
            vocab=len(each[0]),
            depth=depth,
            groups=groups,
            out=out.data_ptr(),
            threads=torch.get_num_threads(),
            isa=isa or instruction_set(),
        )
    return out / _LOG2E


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
