"""Log-probability increase (arXiv 2411.10950, equation 6): the sum of the position scores of the best heads."""

from __future__ import annotations

from torch import Tensor

from ...core.layout import ImageLayout
from ..registry import Heads, heatmap_method
from ..scores import Scores


@heatmap_method("logprob", "increase of log p(token) by each patch, summed over the best heads", every_position=True)
def attribution(scores: Scores, token: int, image: ImageLayout, heads: Heads) -> Tensor:
    """Return the log-probability increase of each position in nats, float32 [N]."""
    return scores.position_scores(token, heads).sum(0)
