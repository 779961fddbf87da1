"""Attention rollout (Abnar & Zuidema 2020, arXiv 2005.00928).

It multiplies the attention weights through the layers, where the residual connection counts as one half of each layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.layout import ImageLayout
from ...core.split import mean_of_heads
from ...kernels import without_autocast
from ..registry import Heads, heatmap_method
from ..scores import Scores, check_attention_everywhere, in_inference


@heatmap_method("rollout", "attention rollout", needs_rerun=True, takes_heads=False, every_position=True)
@in_inference
def attribution(scores: Scores, token: int, image: ImageLayout, heads: Heads) -> Tensor:
    """Return the share of 1 that reaches each position up to the row, float32 [row + 1]."""
    check_attention_everywhere(scores, "rollout")
    row = scores.trace.rows[token]
    layers: list[Tensor] = []
    split = scores.text_model.split
    scores.replay.hidden_states(row + 1, lambda layer, alpha: layers.append(mean_of_heads(alpha[0], split)))
    # one row of the product of (A + I) / 2, from the last layer down
    flow = torch.zeros(row + 1, dtype=layers[0].dtype, device=layers[0].device)
    flow[row] = 1.0
    for mean in reversed(layers):
        flow = _further(flow.to(mean.device), mean)
    return flow


@without_autocast
def _further(flow: Tensor, layer: Tensor) -> Tensor:
    """Return what reaches each position one layer further down."""
    return (flow + flow @ layer) / 2
