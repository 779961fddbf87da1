"""The linear layer in the compiled extension, with the same contract as `torch_kernel.linear`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..extension import cpu_extension
from ..paths import instruction_set


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, isa: str | None = None) -> Tensor:
    """Compute `skinny_linear` for a weight in float32 or bfloat16 and `x` in the weight's dtype or float32.

    `isa` selects an instruction set (for tests); None selects the best of the processor.
    """
    columns, depth = weight.shape
    out = torch.empty(*x.shape[:-1], columns, dtype=x.dtype)
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.to(weight.dtype).contiguous()
    extension, _ = cpu_extension()
    if out.numel():
        extension.skinny_linear(  # type: ignore[union-attr]
            (x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr()),
            (x.dtype == torch.bfloat16, weight.dtype == torch.bfloat16),
            (out.numel() // columns, columns, depth),
            torch.get_num_threads(),
            isa or instruction_set("skinny_linear", weight.dtype),
        )
    return out
