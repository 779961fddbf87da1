"""Gradient times input (Shrikumar et al. 2016, arXiv 1605.01713).

It is the first-order change of log p(token) with the embedding of each image token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.layout import ImageLayout
from ...kernels import wide_type
from ..registry import Heads, heatmap_method
from ..replay import gradient
from ..scores import Scores


@heatmap_method("gradient-input", "gradient times input", needs_rerun=True, takes_heads=False, every_position=True)
def attribution(scores: Scores, token: int, image: ImageLayout, heads: Heads) -> Tensor:
    """Return the gradient times input of each position up to the row, in nats, float32 [row + 1]."""
    row = scores.trace.rows[token]
    with scores.replay.differentiable(row + 1) as embeds:
        hidden = scores.replay.hidden_states(row + 1, lambda layer, alpha: None, embeds)
        logits = scores.replay.text.logits(hidden[-1])
        wide = wide_type(logits.dtype)
        log_prob = torch.log_softmax(logits.to(wide), -1)[scores.token_ids[token]]
        found = gradient(log_prob, embeds)
    return (found.to(wide) * embeds.detach().to(wide)).sum(-1)
