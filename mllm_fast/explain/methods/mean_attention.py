"""Mean attention of all layers and heads: the usual baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from ...core.layout import ImageLayout
    from ..explanation import Explanation, Heads


def image_values(ex: Explanation, token: int, image: ImageLayout, heads: Heads) -> Tensor:
    """Shares of 1, float32 [n]."""
    return ex.attention(token).mean((0, 1))[image.positions]
