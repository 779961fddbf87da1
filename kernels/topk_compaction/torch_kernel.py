"""The definition of `topk_compaction` in plain torch, which the CPU uses as well."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def select(mass: Tensor, keep: int, candidates: Tensor, always: Tensor | None) -> Tensor:
    """Return the kept positions of each layer in ascending order, int64 [L, M]."""
    chosen_from = candidates.nonzero()[:, 0]
    mass = mass[:, chosen_from]
    # "+ 0.0" turns -0.0 into 0.0, because a GPU's sort may compare bits
    mass = torch.where(mass.isnan(), -torch.inf, mass) + 0.0
    # the sort is stable, so that the lower position comes first among equal masses
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
    """Compute `mllm_fast.kernels.topk_compaction`, with the same arguments and result; `count` is M."""
    positions = select(mass, keep, candidates, always)
    heads, _, width = keys[0].shape
    out = [keys[0].new_empty(len(keys), heads, count, width) for _ in range(2)]
    for layer, chosen in enumerate(positions):
        for tensors, gathered in zip((keys, values), out, strict=True):
            torch.index_select(tensors[layer], 1, chosen, out=gathered[layer])
    return positions, out[0], out[1]
