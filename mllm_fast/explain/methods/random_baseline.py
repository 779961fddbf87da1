"""Chance: what a map is worth that knows nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.layout import ImageLayout
from ..registry import Heads, heatmap_method
from ..scores import Scores


@heatmap_method("random", "chance")
def attribution(scores: Scores, token: int, image: ImageLayout, heads: Heads) -> Tensor:
    """Uniform over 0 to 1, the same again for a token of the same place and text: float32 [n]."""
    seed = hash((token, *scores.input_ids.tolist())) & (2**63 - 1)  # of numbers: the same in every process
    return torch.rand(len(image.positions), generator=torch.Generator().manual_seed(seed))
