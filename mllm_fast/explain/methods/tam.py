"""Token activation map (Li et al. 2025, arXiv 2506.23270).

It takes the token's logit at every image token, subtracts what earlier words of the context explain of it, and smooths
the rest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.layout import ImageLayout
from ...kernels import without_autocast
from ..registry import Heads, heatmap_method
from ..scores import Scores, in_inference

_SIDE = 3  # side of the filter's window, in cells


@heatmap_method("tam", "token activation map", needs_rerun=True, takes_heads=False)
@in_inference
def attribution(scores: Scores, token: int, image: ImageLayout, heads: Heads) -> Tensor:
    """Return the activation of each image token, without a unit, float32 [n]."""
    row, text = scores.trace.rows[token], scores.replay.text
    hidden = scores.replay.hidden_states(row + 1)
    ids = scores.input_ids[: row + 1]
    context = torch.cat([scores.layout.positions("query"), torch.arange(scores.layout.prompt_length, row + 1)])
    context = context[ids[context] != scores.token_ids[token]]
    positions = image.positions.to(hidden.device)
    words = torch.cat([ids[context], torch.tensor([scores.token_ids[token]])]).to(hidden.device)
    activation = F.relu(text.logits(hidden[positions])[:, words].float()).T  # [words, n]
    relevance = F.relu(text.logits(hidden[context.to(hidden.device)])[:, scores.token_ids[token]].float())
    own = less(activation[-1], activation[:-1], relevance)
    start, parts = 0, []
    for tile in image.known_tiles:
        part = own[start : start + tile.rows * tile.cols].reshape(tile.rows, tile.cols)
        parts.append(rank_gaussian(part).flatten())
        start += tile.rows * tile.cols
    return torch.cat(parts)


@without_autocast
def less(activation: Tensor, others: Tensor, relevance: Tensor) -> Tensor:
    """Return an activation without the part that the other words explain, never below 0.

    The part is the mean of the others, weighted by relevance and scaled to fit the activation best (least squares).

    Args:
        activation: [n].
        others: the activations of the other words, [words, n].
        relevance: the weights of the other words, [words].
    """
    mean = relevance @ others / relevance.sum().clamp_min(1e-8)
    measure = activation @ mean / (mean @ mean).clamp_min(1e-30)
    return F.relu(activation - measure * mean)


def rank_gaussian(values: Tensor) -> Tensor:
    """Smooth a map [rows, cols] by a rank Gaussian filter.

    Each cell becomes a mean of its sorted 3 x 3 window, weighted by a Gaussian around the rank of the median. The
    Gaussian's width in ranks is the window's standard deviation over its mean.
    """
    half = _SIDE // 2
    mode = "reflect" if min(values.shape) > half else "replicate"
    padded = F.pad(values[None, None], (half,) * 4, mode=mode)
    windows = F.unfold(padded, _SIDE)[0].sort(0).values  # [9, cells]
    mean = windows.mean(0)
    width = (windows.std(0, correction=0) / mean.clamp_min(1e-30)).clamp_min(1e-6)
    rank = torch.arange(len(windows), device=values.device)[:, None] - len(windows) // 2
    weight = torch.exp(-(rank**2) / (2 * width**2))
    return ((windows * weight).sum(0) / weight.sum(0)).reshape(values.shape)
