"""The exhaustive causal explanation: every patch knocked out in turn, as many forward passes as there are patches. What
a patch alone is worth to the word, and so the yardstick of the others."""

from __future__ import annotations

from torch import Tensor

from ...core.layout import ImageLayout
from ..registry import Heads, heatmap_method
from ..scores import Scores
from ..verify import log_probs


@heatmap_method("exhaustive", "fall of log p(token) without each patch", needs_rerun=True)
def attribution(scores: Scores, token: int, image: ImageLayout, heads: Heads) -> Tensor:
    """How much log p(token) falls, in nats, when the patch is closed to query and generated tokens: float32 [n]."""
    positions = image.positions
    logs = log_probs(scores, token, [positions[:0], *positions[:, None]])
    return logs[0] - logs[1:]
