"""The increase in the compiled extension, with the same contract as `torch_kernel.increase`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..extension import cpu_extension
from ..paths import instruction_set
from .base import Base
from .operators import Operators, held_together

_MADE_BYTES = 1 << 26  # bytes of operators outside the cache that one call keeps alive


def increase(
    base: Base,
    values: Tensor,
    gain: Tensor | None,
    operands: Tensor | Operators,
    rescale: Tensor | None,
    source: Tensor | None,
    isa: str | None = None,
) -> Tensor:
    """Compute `torch_kernel.increase` in float32, for operands in float32 or bfloat16 and writes of any dtype.

    `isa` selects an instruction set (for tests); None selects the best of the processor.
    """
    values = values.to(torch.float32)
    out = torch.empty(values.shape[:2])
    if isinstance(operands, Tensor):
        _fill(out, base, values, gain, [operands], rescale, source, isa)
        return out
    names = base.each(source)
    for part, held in held_together(operands, _MADE_BYTES):
        _fill(out[part], base, values[part], gain, held, None if rescale is None else rescale[part], names[part], isa)
    return out


def _fill(
    out: Tensor,
    base: Base,
    values: Tensor,
    gain: Tensor | None,
    operands: list[Tensor],
    rescale: Tensor | None,
    source: Tensor | None,
    isa: str | None,
) -> None:
    if not out.numel():
        return
    groups, rows, depth = values.shape
    vocab = len(operands[0])
    # these names keep contiguous copies alive until the call is over
    values, logs, scale, tokens = (one.contiguous() for one in (values, base.log_probs, base.scale, base.tokens))
    source = None if source is None else source.contiguous()
    gain = None if gain is None else gain.to(values.dtype).contiguous()
    lean = None if rescale is None else base.lean.contiguous()
    rescale = None if rescale is None else rescale.contiguous()
    raw = None if base.cap is None else base.raw.contiguous()
    operands = [one.contiguous() for one in operands]
    extension, _ = cpu_extension()
    extension.increase(  # type: ignore[union-attr]
        values.data_ptr(),
        [one.data_ptr() for one in operands],
        operands[0].dtype == torch.bfloat16,
        (_address(source), tokens.data_ptr()),
        (scale.data_ptr(), _address(rescale), _address(gain)),
        (logs.data_ptr(), _address(lean), _address(raw)),
        base.cap or 0.0,
        (len(logs), groups, rows, vocab, depth),
        out.data_ptr(),
        torch.get_num_threads(),
        isa or instruction_set("logprob_increase", operands[0].dtype),
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
