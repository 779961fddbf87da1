"""The causal check of a heatmap.

It knocks out the patches that the heatmap marks as high, and tests whether the token's probability falls (the knockout
of arXiv 2411.17491, applied to the heatmaps of arXiv 2411.10950).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
from ..knockout.plan import PerSequencePositions, Plan, PlanRule, plan_rules
from ..runtime.hooks import recording
from ..runtime.kv_cache import CACHE, full_cache
from .registry import DEFAULT, Heads
from .scores import Scores, in_inference
from .verification import Verification

_SEED = 0
_CACHE_BYTES = 1 << 30  # limit for the caches of the variants that run in one batch


@in_inference
def verify(scores: Scores, token: int, top: float, controls: int, heads: Heads, method: str = DEFAULT) -> Verification:
    """See `Explanation.verify`."""
    if not 0 < top < 1:
        raise InputError(f"top is a share of the image's tokens between 0 and 1, got {top}")
    if controls < 1:
        raise InputError(f"controls is at least 1, got {controls}")
    patches = scores.layout.positions("image")
    if not len(patches):
        raise InputError("the prompt has no image, so there are no patches to knock out")
    count = max(1, math.ceil(top * len(patches)))
    values = torch.cat([scores.attribution(token, method, heads, image) for image in range(len(scores.layout.images))])
    order = patches[values.argsort(descending=True, stable=True)]
    generator = torch.Generator().manual_seed(_SEED)
    random = [patches[torch.randperm(len(patches), generator=generator)[:count]] for _ in range(controls)]
    variants = [patches[:0], order[:count], order[-count:], *random]
    logs = log_probs(scores, token, variants)
    change = [float(x) for x in logs[1:] - logs[0]]
    changes = change[0], change[1], tuple(change[2:])
    return Verification(token, float(logs[0]), count, len(patches), *changes, method, heads)


@in_inference
def log_probs(scores: Scores, token: int, variants: Sequence[Tensor]) -> Tensor:
    """Return log p(token) with each set of patches knocked out.

    A knockout hides the patches from query and generated tokens in all layers.

    Args:
        scores: the explanation.
        token: the token's index.
        variants: the sets of patches, each a tensor of positions.

    Returns:
        float64 [len(variants)], on the CPU.

    Raises:
        InputError: the explanation keeps too little, see `Explanation.replay`.
    """
    scores.replay  # noqa: B018
    trace = scores.trace
    # rows before the first one that a knockout touches do not change, so they are not run again
    rows = torch.cat([scores.layout.positions("query"), scores.layout.positions("generated")])
    row = trace.rows[token]
    first = min(int(rows.min()), row) if scores.text_model.resumable else 0
    each = sum(k[:, : row + 1].nbytes for k in (*trace.keys, *trace.values))
    step = max(1, _CACHE_BYTES // each)
    parts = [_run(scores, variants[i : i + step], first, row) for i in range(0, len(variants), step)]
    # float32 is too coarse for differences of log p when p is near 1
    logits = torch.cat(parts).double()
    return torch.log_softmax(logits, -1)[:, scores.token_ids[token]].cpu()


def _cache_until(stop: int, count: int, scores: Scores) -> Any:
    """Return a cache of `count` copies of the recorded keys and values of the first positions."""
    trace, cache, filled = scores.trace, full_cache(scores.text_model), set()
    for site, keys, values in zip(scores.text_model.sites, trace.keys, trace.values, strict=True):
        if site.cache is not None and site.cache not in filled:  # layers may share their keys and values
            filled.add(site.cache)
            before = [part[None, :, :stop].expand(count, -1, -1, -1) for part in (keys, values)]
            cache.update(before[0], before[1], site.cache)
    return cache


def _run(scores: Scores, variants: Sequence[Tensor], first: int, row: int) -> Tensor:
    """Return the logits at position `row`, [len(variants), V].

    The positions from `first` to `row` are run again, over the cached keys and values of the positions before.
    """
    replay = scores.replay
    text, count = replay.text, len(variants)
    given: dict[str, Any] = {"use_cache": False}
    if first:
        given = {"use_cache": True, CACHE: _cache_until(first, count, scores)}
    patches = PerSequencePositions(tuple(tuple(v.tolist()) for v in variants))
    plan = Plan(
        [*plan_rules(replay.rules), PlanRule(patches, "query+generated", "all")],
        [scores.layout] * count,
        len(text.layers),
        device=replay.embeds.device,
    )
    with recording(text, knockouts=plan, backend=replay.backend):
        hidden = text.decoder(
            inputs_embeds=replay.embeds[:, first : row + 1].expand(count, -1, -1),
            **given,
            **replay.arguments(first, row + 1, count),
        ).last_hidden_state
        return text.logits(hidden[:, -1])
