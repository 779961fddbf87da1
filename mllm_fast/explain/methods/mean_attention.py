"""Mean attention weights over all layers and heads, the usual baseline."""

from __future__ import annotations

from torch import Tensor

from ...core.layout import ImageLayout
from ..registry import Heads, heatmap_method
from ..scores import Scores


@heatmap_method("attention", "mean attention over all layers and heads", takes_heads=False, every_position=True)
def attribution(scores: Scores, token: int, image: ImageLayout, heads: Heads) -> Tensor:
    """Return the mean attention weight of each position, a share of 1, float32 [N]."""
    return scores.attention(token)[list(scores.text_model.site_layers)].mean((0, 1))
