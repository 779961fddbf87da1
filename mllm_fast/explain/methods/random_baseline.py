"""A random map, the baseline for a map without information."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.layout import ImageLayout
from ..registry import Heads, heatmap_method
from ..scores import Scores


@heatmap_method("random", "chance", takes_heads=False)
def attribution(scores: Scores, token: int, image: ImageLayout, heads: Heads) -> Tensor:
    """Return uniform random numbers from 0 to 1, float32 [n].

    The numbers are the same for a token with the same index in the same sequence.
    """
    seed = hash((token, *scores.input_ids.tolist())) & (2**63 - 1)  # a hash of integers is the same in every process
    number = next(i for i, one in enumerate(scores.layout.images) if one is image)
    before = sum(len(one.positions) for one in scores.layout.images[:number])  # each image has numbers of its own
    return torch.rand(before + len(image.positions), generator=torch.Generator().manual_seed(seed))[before:]
