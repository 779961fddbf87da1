"""The weighted values in the compiled extension, with the same contract as `torch_kernel.weighted_values`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..extension import cpu_extension
from ..paths import instruction_set


def weighted_values(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    heads: Sequence[tuple[int, int]],
    count: int,
    scale: Sequence[float],
    seen: Sequence[Tensor | None],
    isa: str | None = None,
) -> Tensor:
    """Compute `torch_kernel.weighted_values` for operands in float32 or bfloat16.

    `isa` selects an instruction set (for tests); None selects the best of the processor.
    """
    width = query.shape[2]
    out = torch.empty(len(heads), count, width)
    rows, each = query.contiguous(), query.shape[1]
    used = sorted({layer for layer, _ in heads})
    masks = {layer: None if seen[layer] is None else seen[layer].contiguous() for layer in used}  # type: ignore[union-attr]
    layers = {
        layer: (
            (keys[layer].data_ptr(), values[layer].data_ptr(), 0 if masks[layer] is None else masks[layer].data_ptr()),  # type: ignore[union-attr]
            (*keys[layer].stride()[:2], *values[layer].stride()[:2]),
            each // len(keys[layer]),
            scale[layer],
        )
        for layer in used
    }
    extension, _ = cpu_extension()
    if out.numel():
        extension.weighted_values(  # type: ignore[union-attr]
            rows.data_ptr(),
            [layers[layer] for layer in used],
            [(used.index(layer), layer * each + head, head) for layer, head in heads],
            query.dtype == torch.bfloat16,
            (count, width),
            out.data_ptr(),
            torch.get_num_threads(),
            isa or instruction_set("weighted_values", query.dtype),
        )
    return out
