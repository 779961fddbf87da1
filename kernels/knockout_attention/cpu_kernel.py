"""Knockout attention in the compiled extension, with the same contract as `reference.attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..extension import cpu_extension
from ..paths import FEW, instruction_set


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor | None,
    table: Tensor | None,
    start: Tensor | None,
    scale: float,
    lse: bool,
    mass: bool | Tensor,
    causal: bool = True,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    isa: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute `reference.attention` for operands in float32 or bfloat16.

    `isa` selects an instruction set (for tests); None selects the best of the processor.
    """
    batch, heads, rows, width = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    shape, strides = (batch, heads, rows, width), (rows * heads * width, width, heads * width, 1)
    output = torch.empty_strided(shape, strides, dtype=query.dtype)  # strides of a [B, R, H, D] array
    total = torch.empty(batch, heads, rows) if lse else None
    share = torch.zeros(batch, heads, keys) if mass is not False else None
    segment_stride = 0
    if segments is not None and table is not None:
        segments = segments if segments.stride()[1] == 1 else segments.contiguous()
        table = table if table.stride()[0] == 1 else table.contiguous()
        segment_stride = segments.stride()[0] if segments.shape[0] > 1 else 0
    start = None if start is None else start.contiguous()
    chosen = mass.contiguous() if isinstance(mass, Tensor) else None
    extension, _ = cpu_extension()
    if batch * heads * rows:
        extension.attention(  # type: ignore[union-attr]
            (query.data_ptr(), key.data_ptr(), value.data_ptr()),
            query.dtype == torch.bfloat16,
            (query.stride(), key.stride(), value.stride()),
            (_address(segments), _address(table), _address(start), _address(sinks)),
            segment_stride,
            (scale, softcap or 0.0),
            (batch, heads, kv_heads, rows, keys, width, keys - rows if causal else keys),
            (output.data_ptr(), _address(total), _address(share), _address(chosen)),
            torch.get_num_threads(),
            isa or instruction_set("knockout_attention", query.dtype, kind_of(rows)),
        )
    return output, total, share


def kind_of(rows: int) -> str:
    """Return the name under which calls of a number of rows are measured; see `kernels.paths`."""
    return "one row" if rows == 1 else "few rows" if rows <= FEW else "prefill"


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
