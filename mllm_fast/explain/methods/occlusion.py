"""The exhaustive causal explanation: every patch is knocked out in turn.

It takes as many forward passes as there are patches. It measures what each patch alone contributes to the word, so the
other methods can be compared with it.
"""

from __future__ import annotations

from torch import Tensor

from ...core.layout import ImageLayout
from ..registry import Heads, heatmap_method
from ..scores import Scores
from ..verify import log_probs


@heatmap_method("exhaustive", "fall of log p(token) without each patch", needs_rerun=True, takes_heads=False)
def attribution(scores: Scores, token: int, image: ImageLayout, heads: Heads) -> Tensor:
    """Return how much log p(token) falls, in nats, when each patch is knocked out, float32 [n].

    The knockout hides the patch from query and generated tokens.
    """
    positions = image.positions
    logs = log_probs(scores, token, [positions[:0], *positions[:, None]])
    return logs[0] - logs[1:]
