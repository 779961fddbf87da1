"""Log-probability increase (arXiv 2411.10950, equation 6): the sum of the position scores of the best heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from ...core.layout import ImageLayout
    from ..explanation import Explanation, Heads


def image_values(ex: Explanation, token: int, image: ImageLayout, heads: Heads) -> Tensor:
    """In nats, float32 [n]."""
    return ex.position_scores(token, heads).sum(0)[image.positions]
