"""Chance: what a map is worth that knows nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ...core.layout import ImageLayout
    from ..explanation import Explanation, Heads


def image_values(ex: Explanation, token: int, image: ImageLayout, heads: Heads) -> Tensor:
    """Uniform over 0 to 1, the same again for a token of the same place and text: float32 [n]."""
    seed = hash((token, *ex.input_ids.tolist())) & (2**63 - 1)  # of numbers: the same in every process
    return torch.rand(len(image.positions), generator=torch.Generator().manual_seed(seed))
