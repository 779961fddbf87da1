"""Compress an image into a context: read it once and keep what was attended to (arXiv 2411.17491).

Each layer keeps the text tokens and the image tokens that the answer, or the question, attended to most.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.errors import InputError, check_choice
from ..core.keep import parse_keep
from ..core.layout import TokenLayout
from ..kernels import Compaction, topk_compaction
from ..models.media import shown
from ..models.offload import home_of
from ..runtime.direct_passes import passes
from ..runtime.hooks import model_lock
from ..runtime.kv_cache import CACHE, cache_of, full_cache, of_one_shape
from ..runtime.model_runner import ModelRunner
from ..runtime.prefill import Prefill, next_position
from ..runtime.recurrent import State, check_state, state_of
from ..runtime.trace import keys_and_values
from .context import Context
from .registry import OBSERVED, PRUNING_SCORES, Prefix, score_name
from .scores import PARTS, AttendedTokens, check_budget, count_of, counts_of_images, kept_count, within_each

_EVERY = ("generated", "query", "key_norm", "random")
_WITHOUT_KEYS = ("generated", "query", "random")  # scores that do not read keys and values


@dataclass(frozen=True)
class ScoredPrefill:
    """An image and a prompt that the model has read once, from which contexts of any size are made.

    Attributes:
        vlm: the model that read them.
        layout: the prompt's segments and images.
        input_ids: the prompt's token ids, on the CPU.
        keys: the keys of the whole prompt, one tensor [Hkv, N, D] per layer.
        values: the values of the whole prompt, one tensor [Hkv, N, D] per layer.
        masses: for "query" and "generated", if requested, the attention mass of those rows, float32 [L, N].
        position: the position of the next token, for the rotary embedding.
        prompt: the prompt.
        description: the model's answer to the prompt; empty if no score needs it.
        images: the images.
        peak_nbytes: the most bytes of keys and values that were held at once.
        first_token: the first token of the model's answer to the prompt.
        state: the state of layers without attention after the prompt, see `runtime.recurrent`; None if there is none.
    """

    vlm: ModelRunner
    layout: TokenLayout
    input_ids: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    masses: dict[str, Tensor]
    position: int
    prompt: str
    description: str
    images: tuple[Any, ...]
    peak_nbytes: int
    first_token: int
    state: State | None = None

    def context(
        self,
        keep: float | int | str = 0.05,
        score: str = "generated",
        parts: str = "query+image",
        seed: int = 0,
        budget: str = "all",
    ) -> Context:
        """Make a context; see `VLM.compress`."""
        score, keep = score_name(score), parse_keep(keep)
        check_choice("parts", parts, PARTS)
        check_budget(budget)
        image = self.layout.positions("image")
        each = None if parts == "query" else counts_of_images(keep, self.layout, budget)
        count = 0 if parts == "query" else count_of(keep, self.layout, budget)
        candidates = torch.zeros(self.layout.length, dtype=torch.bool)
        candidates[image] = True
        always = ~candidates
        if parts == "image":
            always[self.layout.positions("query")] = False
        keys, values = of_one_shape(self.keys), of_one_shape(self.values)
        sizes = keys[0].shape[-1], values[0].shape[-1]
        unread = count == len(image) and PRUNING_SCORES.get(score).observes not in ("", *self.masses)
        # a score that was not read is not needed where everything is kept
        scored = torch.zeros(len(keys), self.layout.length) if unread else self._score(score, seed)
        if each is not None:
            scored = within_each(scored, self.layout, each)
        compact = self._compacted(
            scored, _of_size(keys, max(sizes)), _of_size(values, max(sizes)), count, candidates, always
        )
        settings = {"keep": keep, "kept": count, "score": score, "parts": parts}
        if each is not None:
            settings["budget"] = budget
        if score == "random":
            settings["seed"] = seed
        return Context(
            vlm=self.vlm,
            keys=compact.keys[..., : sizes[0]],
            values=compact.values[..., : sizes[1]],
            positions=compact.positions.cpu(),
            layout=self.layout,
            input_ids=self.input_ids,
            position=self.position,
            prompt=self.prompt,
            description=self.description,
            settings=settings,
            images=self.images,
            state=self.state,
            first_token=self.first_token,
            peak_nbytes=self.peak_nbytes + compact.keys.nbytes + compact.values.nbytes,
        )

    def _compacted(
        self,
        scored: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        count: int,
        candidates: Tensor,
        always: Tensor,
    ) -> Compaction:
        """Compact the keys and values of all layers, each where it lies, and join them on the model's home."""
        backend = "auto" if self.vlm.backend == "cpu" else self.vlm.backend  # this operation has no C++ kernel
        home = home_of(self.vlm.model)
        parts: dict[int, tuple[Tensor, ...]] = {}
        for device in {one.device for one in keys}:
            sites = [site for site, one in enumerate(keys) if one.device == device]
            found = topk_compaction(
                scored[sites].to(device),
                [keys[site] for site in sites],
                [values[site] for site in sites],
                keep=count,
                candidates=candidates.to(device),
                always=always.to(device),
                backend=backend,
            )
            if len(sites) == len(keys) and device == home:
                return found
            parts |= dict(zip(sites, zip(*(one.to(home) for one in found), strict=True), strict=True))
        return Compaction(*(torch.stack(one) for one in zip(*(parts[site] for site in range(len(keys))), strict=True)))

    @property
    def nbytes(self) -> int:
        """The bytes of the whole prefix's keys and values."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def _score(self, name: str, seed: int) -> Tensor:
        found = PRUNING_SCORES.get(name)
        if found.observes and found.observes not in self.masses:
            raise InputError(f"score {name!r} was not read; prefill_and_score(..., scores=[{name!r}])")
        keys, values, split = self.keys, self.values, self.vlm.text.split
        if split is not None and name not in _WITHOUT_KEYS:  # a score sees the heads of all processes
            keys, values = (tuple(split.gather(one, 0, split.kv_heads) for one in many) for many in (keys, values))
        prefix = Prefix(keys, values, self.layout, self.masses.get(found.observes), seed)
        given = found.score(prefix)
        expected = len(self.keys), self.layout.length
        if not isinstance(given, Tensor) or tuple(given.shape) != expected:
            got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise InputError(f"the pruning score {name!r} gives a tensor [layers, tokens], {expected}; got {got}")
        return given.float()


class ContextSizes(NamedTuple):
    """How large a context is, which may not be made yet; see `Context`."""

    num_tokens: int
    prefix_length: int
    nbytes: int
    full_nbytes: int


def context_sizes(first: Prefill, layout: TokenLayout, keep: float | int, budget: str = "all") -> ContextSizes:
    """Return the sizes of the context that will be made of a prefill."""
    keys, values = of_one_shape(first.keys), of_one_shape(first.values)
    image, length = len(layout.positions("image")), layout.length
    kept = length - image + count_of(keep, layout, budget)
    each = sum(one.nbytes for one in (*keys, *values)) // length
    return ContextSizes(kept, length, kept * (each + len(keys) * torch.int64.itemsize), each * length)


def whole_context(runner: ModelRunner, first: Prefill, layout: TokenLayout) -> Context:
    """Return a context that keeps everything, for a prompt that goes on behind it word for word.

    Args:
        runner: the model.
        first: the result of the forward pass over the prefix.
        layout: the layout of the prefix.
    """
    count, home = len(layout.positions("image")), home_of(runner.model)
    return Context(
        vlm=runner,  # type: ignore[arg-type]
        keys=torch.stack([one.to(home) for one in of_one_shape(first.keys)]),
        values=torch.stack([one.to(home) for one in of_one_shape(first.values)]),
        positions=torch.arange(layout.length).expand(len(first.keys), -1).contiguous(),
        layout=layout,
        input_ids=first.input_ids,
        position=first.position,
        prompt="",
        description="",
        settings={"keep": "off", "kept": count, "score": "", "parts": "query+image"},
        images=(),
        state=None,
        first_token=int(first.logits.argmax()),
        peak_nbytes=0,
    )


def _of_size(tensors: Sequence[Tensor], size: int) -> list[Tensor]:
    """Return tensors [..., D] filled up with zeros to [..., size]."""
    return [one if one.shape[-1] == size else pad(one, (0, size - one.shape[-1])) for one in tensors]


def compress(  # noqa: PLR0913
    runner: ModelRunner,
    image: Any,
    keep: float | int | str = 0.05,
    prompt: str = "Describe the image.",
    score: str = "generated",
    parts: str = "query+image",
    seed: int = 0,
    max_new_tokens: int = 64,
    budget: str = "all",
    **options: Any,
) -> Context:
    """See `VLM.compress`."""
    score = score_name(score)
    check_choice("parts", parts, PARTS)
    check_budget(budget)
    kept_count(parse_keep(keep), sys.maxsize)
    prefill = prefill_and_score(runner, image, prompt, [score], max_new_tokens, **options)
    return prefill.context(keep, score, parts, seed, budget)


def prefill_and_score(
    vlm: ModelRunner, image: Any, prompt: str, scores: Sequence[str] = _EVERY, max_new_tokens: int = 64, **options: Any
) -> ScoredPrefill:
    """Read an image with a prompt, once for each kind of rows that a score observes.

    Args:
        vlm: the model.
        image: an image, or several.
        prompt: what the model is asked first.
        scores: the pruning scores that contexts may use later.
        max_new_tokens: the most tokens of the model's answer to the prompt, for scores that observe it.
        options: options of transformers' `generate`, for one sequence and one beam.

    Raises:
        InputError: a score is unknown, a layer of the model does not see the whole sequence, or the model's answer has
            no token to score by.
    """
    observed = {PRUNING_SCORES.get(score_name(score)).observes for score in scores}
    settings = vlm.settings(max_new_tokens, options, greedy=True)
    settings.check_single("compress")
    check_state(vlm.text)
    pictures = vlm.prompts.load(image)
    if not pictures:
        raise InputError("there is no image to compress; give one, or a list of them")
    inputs, (layout,), _ = vlm.prompts.prepare([pictures], [prompt])
    watched: dict[str, Tensor] = {}
    description, peak, state = "", 0, None
    # scores that observe no rows need one plain run
    for score in [one for one in OBSERVED if one and one in observed] or [""]:
        watcher = AttendedTokens(layout, score, len(vlm.text.sites), vlm.text.split) if score else None
        length = max_new_tokens if score == "generated" else 1
        forced = {"max_new_tokens": length, "use_cache": True, "return_dict_in_generate": True, **vlm.whole_cache()}
        with passes(vlm.text, 1, shares=watcher, backend=vlm.backend, read=vlm.model) as record:
            output = vlm.run(inputs, settings, **forced)
        keys, values = keys_and_values(vlm.text, record, cache_of(output), layout.length)
        peak = max(peak, sum(part.untyped_storage().nbytes() for part in (*keys, *values)))
        if watcher is not None:
            mass = watcher.mean()
            if mass is None:
                raise InputError(
                    f"no token of a reply to {prompt!r} was read (max_new_tokens is {length}), so there are no rows to"
                    " score by: give another prompt, more tokens, or score='query'"
                )
            watched[score] = mass
        if vlm.text.findings.others and length == 1:
            state = state_of(cache_of(output), vlm.text)
        if score == "generated":
            description = vlm.processor.tokenizer.decode(output.sequences[0, layout.length :], skip_special_tokens=True)
    if vlm.text.findings.others and state is None:  # the answer was read after the prompt: read the prompt alone
        with model_lock(vlm.text), vlm.text.inference():
            read = vlm.model(**inputs, **{CACHE: full_cache(vlm.text)}, use_cache=True, logits_to_keep=1)
        state = state_of(cache_of(read), vlm.text)
    return ScoredPrefill(
        vlm=vlm,
        layout=layout,
        input_ids=inputs["input_ids"][0].cpu(),
        keys=keys,
        values=values,
        masses=watched,
        position=next_position(record, layout.length),
        prompt=prompt,
        description=description.strip(),
        images=tuple(shown(pictures, layout)),
        peak_nbytes=peak,
        first_token=int(output.sequences[0, layout.length]),
        state=state,
    )
