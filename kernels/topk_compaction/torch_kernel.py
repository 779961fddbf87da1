"""The definition of `topk_compaction`, in plain torch; also what the CPU uses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def select(mass: Tensor, keep: int, candidates: Tensor, always: Tensor | None) -> Tensor:
    """The kept positions of each layer, int64 [L, M], ascending."""
    chosen_from = candidates.nonzero()[:, 0]
    mass = mass[:, chosen_from]
    mass = torch.where(mass.isnan(), -torch.inf, mass) + 0.0  # no minus before zero: a GPU's sort may look at bits
    # stable: of equal masses the lower position comes first
    best = torch.sort(mass, dim=1, descending=True, stable=True).indices[:, :keep]
    kept = chosen_from[best]
    if always is not None:
        kept = torch.cat([kept, always.nonzero()[:, 0].expand(len(mass), -1)], 1)
    return kept.sort(dim=1).values


def compact(
    mass: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    keep: int,
    candidates: Tensor,
    always: Tensor | None,
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and result as `mllm_fast.kernels.topk_compaction`; count: M."""
    positions = select(mass, keep, candidates, always)
    heads, _, width = keys[0].shape
    out = [keys[0].new_empty(len(keys), heads, count, width) for _ in range(2)]
    for layer, chosen in enumerate(positions):
        for tensors, gathered in zip((keys, values), out, strict=True):
            torch.index_select(tensors[layer], 1, chosen, out=gathered[layer])
    return positions, out[0], out[1]
