"""Gradient-weighted attention (Chefer, Gur & Wolf 2021, arXiv 2103.15679, equations 5 and 6).

LVLM-Interpret shows this map. R starts as the identity I. Layer by layer, R += (mean over heads of (dy/dA * A)+) times
R, where y is the token's logit. The result is the row of R at the explained position. The backward pass meets the
layers from the last to the first, so one row is enough.
"""

from __future__ import annotations

from torch import Tensor

from ...core.layout import ImageLayout
from ...core.split import mean_of_heads
from ...kernels import without_autocast
from ..registry import Heads, heatmap_method
from ..replay import gradient
from ..scores import Scores, check_attention_everywhere


@heatmap_method("relevancy", "gradient-weighted attention", needs_rerun=True, takes_heads=False, every_position=True)
def attribution(scores: Scores, token: int, image: ImageLayout, heads: Heads) -> Tensor:
    """Return the relevance of each position up to the row, without a unit, float32 [row + 1]."""
    check_attention_everywhere(scores, "relevancy")
    row, split = scores.trace.rows[token], scores.text_model.split
    flow: Tensor | None = None

    def on_weights(layer: int, alpha: Tensor) -> None:
        weights = alpha.detach()  # detached, since a hook that holds its own tensor is never freed

        def backward(change: Tensor) -> None:
            nonlocal flow
            if flow is None:
                flow = weights.new_zeros(row + 1)
                flow[row] = 1.0
            flow = _further(flow.to(weights.device), mean_of_heads((change * weights)[0].clamp_min(0), split))

        alpha.register_hook(backward)

    with scores.replay.differentiable(row + 1) as embeds:
        hidden = scores.replay.hidden_states(row + 1, on_weights, embeds)
        logit = scores.replay.text.logits(hidden[-1])[scores.token_ids[token]]
        gradient(logit, embeds)
    assert flow is not None
    return flow.detach()


@without_autocast
def _further(flow: Tensor, layer: Tensor) -> Tensor:
    """Return the relevance of each position one layer further down."""
    return flow + flow @ layer
