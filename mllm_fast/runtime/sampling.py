"""How the next token is chosen: as transformers' `generate` would, for one sequence or for many at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .model_runner import ModelRunner


def next_tokens(
    logits: Tensor, input_ids: Tensor | None, processors: Any, sample: bool, generator: torch.Generator | None = None
) -> Tensor:
    """The next token of each sequence, int64 [B].

    Args:
        logits: of the next tokens, float32 [B, V]. input_ids: the sequences so far, [B, N], for the processors.
        processors: transformers' logits processors; empty or None for none.
        sample: draw from the probabilities, with `generator`; else the likeliest token.
    """
    scores = processors(input_ids, logits) if processors else logits
    if sample:
        return torch.multinomial(torch.softmax(scores, -1), 1, generator=generator)[:, 0]
    return scores.argmax(-1)


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0: the likeliest token. `seed`: of the random numbers, any if None."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(eq=False)
class Sampler:
    """Chooses the tokens of one sequence. `processors`: transformers' own, of the model's generation settings too."""

    processors: Any
    sample: bool
    ids: list[int]  # of the whole sequence so far
    generator: torch.Generator | None = field(default=None, repr=False)

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is all there is to it."""
        return not self.sample and not self.processors

    def choose(self, logits: Tensor) -> int:
        """The next token after the logits [V]."""
        ids = torch.tensor([self.ids], device=logits.device) if self.processors else None
        return int(next_tokens(logits[None].float(), ids, self.processors, self.sample, self.generator))


class SamplerCache:
    """Makes samplers; what transformers prepares for one set of settings is kept."""

    def __init__(self, runner: ModelRunner):
        self._runner = runner
        self._known: dict[tuple[float, float], Any] = {}

    def make(self, ids: Sequence[int], sampling: Sampling) -> Sampler:
        """A sampler of the sequence that begins with `ids`. Prepared by `generate`, which needs the model's lock."""
        key = sampling.temperature, sampling.top_p
        processors = self._known.get(key)
        if processors is None:
            # whose rule depends on where the prompt ends must know the prompt
            processors = self._prepared(torch.tensor([[1]]), sampling)
            if all(_stateless(one) for one in processors):
                self._known[key] = processors
            else:
                processors = self._prepared(torch.tensor([list(ids)]), sampling)
        generator = None
        if sampling.temperature:
            generator = torch.Generator(self._runner.model.device)
            generator.seed() if sampling.seed is None else generator.manual_seed(sampling.seed)
        return Sampler(processors, sampling.temperature > 0, list(ids), generator)

    def _prepared(self, ids: Tensor, sampling: Sampling) -> Any:
        ids = ids.to(self._runner.model.device)
        options: dict[str, Any] = {"custom_generate": _prepared_only}
        if sampling.temperature:
            # no other filter than those that were asked for
            options |= {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        return next(self._runner.run({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 1, options))


def _prepared_only(model: Any, input_ids: Tensor, logits_processor: Any, *_: Any, **__: Any) -> Iterator[Any]:
    yield logits_processor


def _stateless(processor: Any) -> bool:
    """Of these the outcome hangs on the scores alone."""
    return type(processor).__name__ in ("TemperatureLogitsWarper", "TopPLogitsWarper", "TopKLogitsWarper")
