"""Sampling of the next token as transformers' `generate` does it, for one sequence or for many at once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from .model_runner import ModelRunner

_COLDEST = 1e-5  # temperatures below it take the likeliest token
_SETTINGS = 64  # settings whose logits processors are kept


def next_tokens(
    logits: Tensor, input_ids: Tensor | None, processors: Any, sample: bool, generator: torch.Generator | None = None
) -> Tensor:
    """Return the next token of each sequence, int64 [B].

    Args:
        logits: Logits of the next tokens, float32 [B, V].
        input_ids: The sequences so far, [B, N], for the processors.
        processors: Transformers' logits processors; empty or None for none.
        sample: Draw from the probabilities; otherwise take the likeliest token.
        generator: The random number generator for the draw.
    """
    scores = logits
    if type(processors) is LogitsProcessorList:  # whose own call looks at the signature of each, every time
        for one in processors:
            scores = one(input_ids, scores)
    elif processors:
        scores = processors(input_ids, logits)
    if sample:
        return torch.multinomial(torch.softmax(scores, -1), 1, generator=generator)[:, 0]
    return scores.argmax(-1)


@dataclass(frozen=True)
class Sampling:
    """The sampling settings of a request.

    Attributes:
        temperature: The temperature; 0 takes the likeliest token, and so does any below 1e-5, whose probabilities no
            float32 can hold. None samples, or not, as the checkpoint's generation config says.
        top_p: Nucleus sampling, the probability mass of the tokens that are kept; 1 if only a temperature is given.
        seed: The seed of the random numbers; None for a random one.
    """

    temperature: float | None = 0.0
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None and self.temperature < _COLDEST:
            object.__setattr__(self, "temperature", 0.0)


@dataclass(eq=False)
class Sampler:
    """Chooses the tokens of one sequence.

    Attributes:
        processors: Transformers' logits processors, those of the model's generation settings included.
        sample: Draw from the probabilities; otherwise take the likeliest token.
        ids: Token ids of the whole sequence so far.
        generator: The random number generator for the draw.
    """

    processors: Any
    sample: bool
    ids: list[int]  # the whole sequence so far
    generator: torch.Generator | None = field(default=None, repr=False)

    @property
    def plain(self) -> bool:
        """Whether the sampler simply takes the likeliest token."""
        return not self.sample and not self.processors

    def choose(self, logits: Tensor) -> int:
        """Return the next token for the logits [V]."""
        ids = torch.tensor([self.ids], device=logits.device) if self.processors else None
        return int(next_tokens(logits[None].float(), ids, self.processors, self.sample, self.generator))


class SamplerCache:
    """Makes samplers, and caches the logits processors that transformers prepares for the latest settings."""

    def __init__(self, runner: ModelRunner):
        self._runner = runner
        self._known: OrderedDict[tuple[float | None, float | None], tuple[Any, bool]] = OrderedDict()

    def make(self, ids: Sequence[int], sampling: Sampling) -> Sampler:
        """Return a sampler for the sequence that begins with `ids`.

        `generate` prepares the logits processors, which needs the model's lock.
        """
        key = sampling.temperature, sampling.top_p
        known = self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
        else:
            # processors that depend on the sequence are made for each prompt: they may need to know where it ends
            known = self._prepared(torch.tensor([[1]]), sampling)
            if all(stateless(one) for one in known[0]):
                self._known[key] = known
                while len(self._known) > _SETTINGS:
                    self._known.popitem(last=False)
            else:
                known = self._prepared(torch.tensor([list(ids)]), sampling)
        processors, sample = known
        generator = None
        if sample:
            generator = torch.Generator(self._runner.model.device)
            generator.seed() if sampling.seed is None else generator.manual_seed(sampling.seed)
        return Sampler(processors, sample, list(ids), generator)

    def _prepared(self, ids: Tensor, sampling: Sampling) -> tuple[Any, bool]:
        ids = ids.to(self._runner.model.device)
        options: dict[str, Any] = {"custom_generate": _prepared_only}
        if sampling.temperature:
            # apply only the filters that were asked for
            options |= {"do_sample": True, "temperature": sampling.temperature, "top_k": 0}
            options["top_p"] = 1.0 if sampling.top_p is None else sampling.top_p
        elif sampling.temperature is not None:
            options["do_sample"] = False
        elif sampling.top_p is not None:
            options["top_p"] = sampling.top_p
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return next(self._runner.run(inputs, self._runner.settings(1, options)))


def _prepared_only(
    model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **_: Any
) -> Iterator[tuple[Any, bool]]:
    yield logits_processor, bool(generation_config.do_sample)


def stateless(processor: Any) -> bool:
    """Return whether the outcome of a processor depends on the scores alone."""
    return type(processor).__name__ in ("TemperatureLogitsWarper", "TopPLogitsWarper", "TopKLogitsWarper")
