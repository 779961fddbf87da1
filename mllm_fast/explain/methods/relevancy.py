"""Gradient-weighted attention (Chefer, Gur & Wolf 2021, arXiv 2103.15679, equations 5 and 6), what LVLM-Interpret
shows.

R = I, then R += mean over heads of (dy/dA * A)+ times R, layer by layer, y being the token's logit; its row of the
explained position. The backward pass meets the layers from the last to the first, so that one row is enough.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..passes import differentiable, hidden_states

if TYPE_CHECKING:
    from ...core.layout import ImageLayout
    from ..explanation import Explanation, Heads


def image_values(ex: Explanation, token: int, image: ImageLayout, heads: Heads) -> Tensor:
    """Relevance, without a unit, float32 [n]."""
    row = ex._trace.rows[token]
    flow: Tensor | None = None

    def weighing(layer: int, alpha: Tensor) -> None:
        weights = alpha.detach()  # a hook that holds its own tensor is never freed

        def backward(gradient: Tensor) -> None:
            nonlocal flow
            if flow is None:
                flow = weights.new_zeros(row + 1)
                flow[row] = 1.0
            flow = flow + flow @ (gradient * weights)[0].clamp_min(0).mean(0)

        alpha.register_hook(backward)

    with differentiable(ex, row + 1) as embeds:
        hidden = hidden_states(ex, row + 1, weighing, embeds)
        logit = ex.replay.text.logits(hidden[-1])[ex.token_ids[token]]
        torch.autograd.grad(logit, embeds)
    assert flow is not None
    return flow.detach()[image.positions.to(flow.device)]
