"""Gradient times input (Shrikumar et al. 2016, arXiv 1605.01713): how log p(token) changes with each image token's
embedding, to first order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels import wide_type
from ..passes import differentiable, hidden_states

if TYPE_CHECKING:
    from ...core.layout import ImageLayout
    from ..explanation import Explanation, Heads


def image_values(ex: Explanation, token: int, image: ImageLayout, heads: Heads) -> Tensor:
    """In nats, float32 [n]."""
    row = ex._trace.rows[token]
    with differentiable(ex, row + 1) as embeds:
        hidden = hidden_states(ex, row + 1, lambda layer, alpha: None, embeds)
        logits = ex.replay.text.logits(hidden[-1])
        wide = wide_type(logits.dtype)
        log_prob = torch.log_softmax(logits.to(wide), -1)[ex.token_ids[token]]
        (gradient,) = torch.autograd.grad(log_prob, embeds)
    return (gradient.to(wide) * embeds.detach().to(wide)).sum(-1)[image.positions.to(embeds.device)]
