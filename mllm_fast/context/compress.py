"""Read a picture once and keep what was attended to (arXiv 2411.17491): the tokens of the text, and of each layer the
image tokens that the answer, or the question, looked at most."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError, check_choice
from ..core.layout import TokenLayout
from ..kernels import topk_compaction
from ..models.processing import one_answer
from ..runtime.hooks import recording
from ..runtime.kv_cache import cache_of
from ..runtime.model_runner import ModelRunner
from ..runtime.prefill import check_cache, check_full_attention, next_position
from .context import Context

SCORES = ("generated", "query", "norm", "random")
PARTS = ("query+image", "query", "image")


class AttendedTokens:
    """Sums the attention mass of the rows that a score counts, over heads and passes."""

    def __init__(self, layout: TokenLayout, score: str, num_layers: int):
        self._length = layout.prompt_length
        self._generated = score == "generated"
        self._query = torch.zeros(self._length, dtype=torch.bool)
        self._query[layout.positions("query")] = True
        self._sum = [torch.zeros(self._length) for _ in range(num_layers)]
        self._rows = [0] * num_layers
        self._counted = 0

    def wants(self, first_row: int, rows: int) -> bool | Tensor:
        """Of `AttentionObserver`."""
        self._counted = 1
        if self._generated or first_row >= self._length:
            return self._generated and first_row >= self._length
        chosen = self._query[first_row : first_row + rows]
        self._counted = int(chosen.sum())
        return chosen[None] if self._counted else False

    def add(self, layer: int, mass: Tensor) -> None:
        """Of `AttentionObserver`: the mass [1, H, N], a mean over the pass's counted rows."""
        here = self._sum[layer].to(mass.device)  # moved once: a copy to the CPU at each token would wait for the GPU
        self._sum[layer] = here + self._counted * mass[0, :, : self._length].float().mean(0)
        self._rows[layer] += self._counted

    def mean(self) -> Tensor | None:
        """float32 [L, N], over heads and counted rows; None if there was no such row."""
        if not all(self._rows):
            return None
        return torch.stack([total.cpu() / rows for total, rows in zip(self._sum, self._rows, strict=True)])


@dataclass(frozen=True)
class Reading:
    """A picture and a prompt, read by the model: from it contexts of any size are made.

    keys, values: of the whole prefix, one [Hkv, N, D] a layer. masses: score -> float32 [L, N], as far as they were
    asked for. position: of the next token, for the rotary embedding. description: what the model said to the prompt,
    empty where no score needs it. peak_nbytes: most bytes of keys and values held at once.
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

    def context(
        self, keep: float | int = 0.05, score: str = "generated", parts: str = "query+image", seed: int = 0
    ) -> Context:
        """See `VLM.compress`."""
        check_choice("score", score, SCORES)
        check_choice("parts", parts, PARTS)
        image = self.layout.positions("image")
        count = 0 if parts == "query" else kept_count(keep, len(image))
        candidates = torch.zeros(self.layout.length, dtype=torch.bool)
        candidates[image] = True
        always = ~candidates
        if parts == "image":
            always[self.layout.positions("query")] = False
        device = self.keys[0].device
        compact = topk_compaction(
            self._mass(score, seed).to(device),
            self.keys,
            self.values,
            keep=count,
            candidates=candidates.to(device),
            always=always.to(device),
            backend="auto" if self.vlm.backend == "cpu" else self.vlm.backend,  # there is no C++ kernel of this op
        )
        settings = {"keep": keep, "kept": count, "score": score, "parts": parts}
        if score == "random":
            settings["seed"] = seed
        return Context(
            vlm=self.vlm,
            keys=compact.keys,
            values=compact.values,
            positions=compact.positions.cpu(),
            layout=self.layout,
            input_ids=self.input_ids,
            position=self.position,
            prompt=self.prompt,
            description=self.description,
            settings=settings,
            images=self.images,
            peak_nbytes=self.peak_nbytes + compact.keys.nbytes + compact.values.nbytes,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the whole prefix's keys and values."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def _mass(self, score: str, seed: int) -> Tensor:
        if score == "random":
            generator = torch.Generator().manual_seed(seed)
            return torch.rand(len(self.keys), self.layout.length, generator=generator)
        if score == "norm":  # small keys draw most attention (Devoto et al. 2024, arXiv 2406.11430)
            return torch.stack([-k.float().norm(dim=-1).mean(0) for k in self.keys])
        if score not in self.masses:
            raise InputError(f"score {score!r} was not read; read(..., scores=[{score!r}])")
        return self.masses[score]


def compress(
    runner: ModelRunner,
    image: Any,
    keep: float | int = 0.05,
    prompt: str = "Describe the image.",
    score: str = "generated",
    parts: str = "query+image",
    seed: int = 0,
    max_new_tokens: int = 64,
    **options: Any,
) -> Context:
    """See `VLM.compress`."""
    check_choice("score", score, SCORES)
    check_choice("parts", parts, PARTS)
    kept_count(keep, sys.maxsize)
    reading = read(runner, image, prompt, [score], max_new_tokens, **options)
    return reading.context(keep, score, parts, seed)


def read(
    vlm: ModelRunner, image: Any, prompt: str, scores: Sequence[str] = SCORES, max_new_tokens: int = 64, **options: Any
) -> Reading:
    """Read a picture with a prompt, once for each score that the model must be watched for.

    Raises:
        InputError: a score that is not known, a model whose layers do not all see the whole sequence, a description
            without a token.
    """
    for score in scores:
        check_choice("score", score, SCORES)
    one_answer("compress", options)
    check_full_attention(vlm)
    pictures = vlm.prompts.load(image)
    if not pictures:
        raise InputError("there is no picture to compress; give one, or a list of them")
    inputs, (layout,), _ = vlm.prompts.prepare([pictures], [prompt])
    watched: dict[str, Tensor] = {}
    description, peak = "", 0
    for score in [s for s in ("query", "generated") if s in scores] or [""]:  # the others need no watching
        watcher = AttendedTokens(layout, score, len(vlm.text.layers)) if score else None
        length = max_new_tokens if score == "generated" else 1
        settings = {**options, "num_beams": 1, "use_cache": True, "return_dict_in_generate": True}
        with recording(vlm.text, 1, shares=watcher, backend=vlm.backend) as record:
            output = vlm.run(inputs, length, settings)
        cache = cache_of(output)
        check_cache(cache, layout.length)
        peak = max(peak, sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers))
        if watcher is not None:
            mass = watcher.mean()
            if mass is None:
                raise InputError(
                    f"no token of a reply to {prompt!r} was read (max_new_tokens is {length}), so there are no rows to"
                    " score by: give another prompt, more tokens, or score='query'"
                )
            watched[score] = mass
        if score == "generated":
            description = vlm.processor.tokenizer.decode(output.sequences[0, layout.length :], skip_special_tokens=True)
    return Reading(
        vlm=vlm,
        layout=layout,
        input_ids=inputs["input_ids"][0].cpu(),
        keys=tuple(layer.keys[0, :, : layout.length] for layer in cache.layers),
        values=tuple(layer.values[0, :, : layout.length] for layer in cache.layers),
        masses=watched,
        position=next_position(record, layout.length),
        prompt=prompt,
        description=description.strip(),
        images=tuple(pictures),
        peak_nbytes=peak,
    )


def kept_count(keep: float | int, total: int) -> int:
    """How many of `total` tokens a `keep` means: a count (int), or a share of them (float), rounded up."""
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise InputError(f"keep is a share between 0 and 1 (0.05), or a count of tokens (29), got {keep!r}")
    if isinstance(keep, int):
        if not 1 <= keep <= total:
            most = "at least 1" if keep < 1 else f"1 to the picture's {total} tokens"
            raise InputError(f"keep, as a count, is {most}, got {keep}")
        return keep
    if not 0 < keep <= 1:  # NaN too
        raise InputError(f"keep, as a share, is above 0 and at most 1.0, got {keep}")
    return max(1, math.ceil(round(keep * total, 9)))
