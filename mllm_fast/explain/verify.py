"""The causal check of a map: knock out the patches it calls high, and see whether the word falls (arXiv 2411.17491's
knockout, applied to arXiv 2411.10950's maps)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..core.errors import InputError
from ..knockout.plan import EachItsOwn, Plan
from ..knockout.rule import Knockout
from ..models.text_model import TextModel
from ..runtime.hooks import Recording, recording
from ..runtime.kv_cache import CACHE
from .names import DEFAULT, map_name

if TYPE_CHECKING:
    from .explanation import Explanation, Heads

_SEED = 0
_MOVED = 0.01  # nats
_CACHE_BYTES = 1 << 30  # of the variants' caches at a time


@dataclass(frozen=True)
class Verification:
    """Changes of log p(token) when patches are knocked out, one a variant.

    token: its index. log_prob: with all patches. count: patches knocked out, of the image tokens' number `of`. top,
    lowest: the change for the map's highest and lowest patches; random: for as many random ones, several times. method,
    heads: of the map that was checked, as in `Explanation.heatmap`; the verdict is about no other map.
    """

    token: int
    log_prob: float
    count: int
    of: int
    top: float
    lowest: float
    random: tuple[float, ...]
    method: str = DEFAULT
    heads: Heads = 10

    @property
    def moved(self) -> bool:
        """Whether any of the variants changed log p(token) by a hundredth of a nat or more."""
        return max(abs(change) for change in (self.top, self.lowest, *self.random)) >= _MOVED

    @property
    def passed(self) -> bool:
        """True if the highest patches hurt the word, and more than the lowest and every random set did."""
        return self.moved and self.top < min(0.0, self.lowest, *self.random)

    @property
    def verdict(self) -> str:
        """ "holds", "fails", or "open": no set of patches moves the word, so the map cannot be told right or wrong."""
        return "open" if not self.moved else "holds" if self.passed else "fails"

    def __str__(self) -> str:
        mean = sum(self.random) / len(self.random)
        meaning = {
            "holds": "the map holds",
            "fails": "THE MAP FAILS, other patches matter as much",
            "open": "no small set of patches moves this word",
        }
        return (
            f"without its {self.count} highest of {self.of} patches log p falls by {fall(self.top)}, without random"
            f" ones by {fall(mean)} (at most {fall(min(self.random))}), without the lowest by"
            f" {fall(self.lowest)}: {meaning[self.verdict]}"
            f" ({map_name(self.method, self.heads)})"
        )


def fall(change: float) -> str:
    """A change of log p as how much it falls, without a minus before zero."""
    return f"{round(0.0 - change, 2) + 0.0:.2f}"


class Replay:
    """What is needed to run an explained sequence, or its end, again: what each pass gave the decoder, and the
    knockouts that were in force."""

    def __init__(self, text: TextModel, record: Recording, rules: tuple[Knockout, ...], backend: str):
        self.text = text
        self.rules = rules
        self.backend = backend
        self.embeds = torch.cat(record.embeds, 1)  # [1, N, d]
        given = [p for p in record.positions if p is not None]
        self.positions = torch.cat(given, -1) if len(given) == len(record.positions) else None  # [..., 1, N]
        self._others = [(embeds.shape[:2], others) for embeds, others in zip(record.embeds, record.others, strict=True)]

    def arguments(self, start: int, stop: int, count: int = 1) -> dict[str, Any]:
        """What the decoder was given at positions `start` .. `stop`, beside embeddings and cache, for `count` copies of
        the sequence.

        Raises:
            InputError: an argument has not one entry a position, and so cannot be cut; or not every pass had it.
        """
        span = slice(start, stop)
        found: dict[str, Any] = {"attention_mask": None, "position_ids": None}
        if self.positions is not None:
            positions = self.positions[..., span]
            found["position_ids"] = positions.expand(*positions.shape[:-2], count, -1)
        for name, whole in self._whole.items():
            found[name] = whole[:, span].expand(count, *[-1] * (whole.ndim - 1))
        return found

    @cached_property
    def _whole(self) -> dict[str, Tensor]:
        """The further arguments of all passes, each [1, N, ...]."""
        names = dict.fromkeys(name for _, others in self._others for name in others)
        return {name: self._joined(name) for name in names if not (name == "attention_mask" and self._sees_all())}

    def _joined(self, name: str) -> Tensor:
        parts = []
        for shape, others in self._others:
            part = others.get(name)
            # a mask's second side are the keys; a position has no part of it
            if name == "attention_mask" or not isinstance(part, Tensor) or part.shape[:2] != shape:
                raise InputError(
                    f"the model's decoder was given {name!r}, which cannot be given again for a part of the sequence:"
                    " maps and checks that run the model again cannot be made for this model or these options; those"
                    ' read from the cache can (heatmap methods "logprob" and "attention")'
                )
            parts.append(part)
        return torch.cat(parts, 1)

    def _sees_all(self) -> bool:
        """Whether the masks that were given close nothing, as for one sequence without padding."""
        masks = [others.get("attention_mask") for _, others in self._others]
        return all(mask is None or (isinstance(mask, Tensor) and mask.ndim == 2 and bool(mask.all())) for mask in masks)


@torch.inference_mode()
def verify(ex: Explanation, token: int, top: float, controls: int, heads: Heads, method: str = DEFAULT) -> Verification:
    """See `Explanation.verify`."""
    if not 0 < top < 1:
        raise InputError(f"top is a share of the image's tokens between 0 and 1, got {top}")
    if controls < 1:
        raise InputError(f"controls is at least 1, got {controls}")
    patches = ex.layout.positions("image")
    if not len(patches):
        raise InputError("the prompt has no picture, so there are no patches to knock out")
    count = max(1, math.ceil(top * len(patches)))
    values = torch.cat([ex.token_values(token, method, heads, image) for image in range(len(ex.layout.images))])
    order = patches[values.argsort(descending=True, stable=True)]
    generator = torch.Generator().manual_seed(_SEED)
    random = [patches[torch.randperm(len(patches), generator=generator)[:count]] for _ in range(controls)]
    variants = [patches[:0], order[:count], order[-count:], *random]
    logs = log_probs(ex, token, variants)
    change = [float(x) for x in logs[1:] - logs[0]]
    changes = change[0], change[1], tuple(change[2:])
    return Verification(token, float(logs[0]), count, len(patches), *changes, method, heads)


@torch.inference_mode()
def log_probs(ex: Explanation, token: int, variants: Sequence[Tensor]) -> Tensor:
    """log p(token) with each set of patches (positions) knocked out, image patches -> query and generated in all
    layers: float64 [len(variants)].

    Raises:
        InputError: the explanation keeps too little, see `Explanation.replay`.
    """
    ex.replay  # noqa: B018
    trace = ex._trace
    # rows before the first one that a knockout touches are as they were
    rows = torch.cat([ex.layout.positions("query"), ex.layout.positions("generated")])
    row = trace.rows[token]
    first = min(int(rows.min()), row)
    each = sum(k[:, : row + 1].nbytes for k in (*trace.keys, *trace.values))
    step = max(1, _CACHE_BYTES // each)
    parts = [_run(ex, variants[i : i + step], first, row) for i in range(0, len(variants), step)]
    # where p is near 1 the differences of log p drown in float32
    logits = torch.cat(parts).double()
    return torch.log_softmax(logits, -1)[:, ex.token_ids[token]].cpu()


def _run(ex: Explanation, variants: Sequence[Tensor], first: int, row: int) -> Tensor:
    """The logits at `row`, [len(variants), V]: positions first .. row run again, over the keys and values of those
    before."""
    replay, trace = ex.replay, ex._trace
    text, count = replay.text, len(variants)
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(trace.keys, trace.values, strict=True)):
        cache.update(
            keys[None, :, :first].expand(count, -1, -1, -1), values[None, :, :first].expand(count, -1, -1, -1), layer
        )
    patches = EachItsOwn(tuple(tuple(v.tolist()) for v in variants))
    rules: list = [(rule.source, rule.target, rule.layers) for rule in replay.rules]
    plan = Plan(
        [*rules, (patches, "query+generated", "all")],
        [ex.layout] * count,
        len(text.layers),
        device=replay.embeds.device,
    )
    with recording(text, knockouts=plan, backend=replay.backend):
        hidden = text.decoder(
            inputs_embeds=replay.embeds[:, first : row + 1].expand(count, -1, -1),
            use_cache=True,
            **{CACHE: cache},
            **replay.arguments(first, row + 1, count),
        ).last_hidden_state
        return text.logits(hidden[:, -1])
