"""Decoding loops that use the logits processors and stopping criteria which transformers' `generate` prepares."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.utils import ModelOutput

from ..core.errors import InputError
from ..knockout.attention_share import AttentionShares
from ..knockout.plan import Plan
from ..models.plain_layers import watched
from .direct_decoder import DirectDecoder, direct_decoder
from .direct_passes import passes
from .direct_sequence import DirectSequence
from .hooks import meet, model_lock
from .kv_cache import CACHE, last_position
from .model_runner import ModelRunner
from .sampling import next_tokens
from .shared_prefix import SharedPrefixDecoder
from .static_step import Score, StaticStep, StepScores
from .trace import Trace, keys_and_values, make_trace


class Pass(NamedTuple):
    """What one forward pass adds to a sequence.

    Attributes:
        token: The id of the new token.
        log_prob: Its log-probability, before any sampling settings.
        sequence: The whole sequence, int64 [N].
        done: Whether the answer ends with it.
        trace: Makes the trace that explains the token, or None if the pass was not recorded.
        scores: Scores of the token that the pass itself computed, or None.
    """

    token: int
    log_prob: float
    sequence: Tensor
    done: bool
    trace: Callable[[], Trace] | None
    scores: StepScores | None = None


@dataclass
class Watch:
    """What is wanted of the next forward pass; it may change between two passes.

    Attributes:
        explain: Record what explains the new token.
        plan: The plan of the knockouts.
        shares: An observer that receives the attention mass.
    """

    explain: bool = False
    plan: Plan | None = None
    shares: AttentionShares | None = None

    @property
    def nothing(self) -> bool:
        """Whether the model may run as it is."""
        return not self.explain and self.plan is None and self.shares is None


def one_sequence(runner: ModelRunner, watch: Watch) -> Callable[..., Iterator[Any]]:
    """Return a loop that decodes one sequence token by token, for transformers' `generate(custom_generate=...)`.

    `generate` prepares the arguments as it does for its own loops. The loop yields None once before the first forward
    pass, then a `Pass` after each. The model itself reads the prompt and the first token; where its layers can be run
    directly (`direct_decoder`), and give the same logits after that token, the others are read so.

    Args:
        runner: The model.
        watch: What is wanted of each pass.
    """

    def loop(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Iterator[Pass | None]:
        yield None
        reader = _Reader(runner, watch, model, model_kwargs)
        ended = end_of(stopping_criteria)
        done = False
        while not done:
            logits, trace = reader.read(input_ids)
            token, log_prob = _chosen(logits, input_ids, logits_processor, generation_config.do_sample)
            input_ids = torch.cat([input_ids, input_ids.new_tensor([[token]])], -1)
            done = ended(input_ids, token)
            yield Pass(token, log_prob, input_ids[0], done, trace)

    return loop


def static_sequence(runner: ModelRunner, watch: Watch, score: Score | None) -> Callable[..., Iterator[Any]]:
    """Return a loop like that of `one_sequence`, whose tokens after the first are read by a `StaticStep`.

    Args:
        runner: The model.
        watch: What is wanted of each pass. Its plan may change between two passes.
        score: What scores a token inside the step, or None.
    """

    def loop(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Iterator[Pass | None]:
        yield None
        sample, ended = generation_config.do_sample, end_of(stopping_criteria)
        longest = [one.max_length for one in stopping_criteria if type(one) is MaxLengthCriteria]
        if not longest:
            raise InputError("static=True needs room for the answer: give max_new_tokens")
        reader = _Reader(runner, replace(watch, explain=True), model, model_kwargs)  # which keeps all keys and values
        logits, trace = reader.read(input_ids)
        token, log_prob = _chosen(logits, input_ids, logits_processor, sample)
        input_ids = torch.cat([input_ids, input_ids.new_tensor([[token]])], -1)
        done = ended(input_ids, token)
        yield Pass(token, log_prob, input_ids[0], done, trace if watch.explain else None)
        if done:
            return
        keys, values, position = reader.held(input_ids.shape[1] - 1)
        given = {"processors": logits_processor, "sample": sample, "score": score, "backend": runner.backend}
        step = StaticStep(runner.text, keys, values, position=position, room=min(longest), **given)
        while not done:
            step.set_plan(watch.plan)
            found = step.step(input_ids)
            input_ids = torch.cat([input_ids, input_ids.new_tensor([[found.token]])], -1)
            done = ended(input_ids, found.token)
            yield Pass(found.token, found.log_prob, input_ids[0], done, found.trace, found.scores)

    return loop


def _chosen(logits: Tensor, ids: Tensor, processors: Any, sample: bool) -> tuple[int, float]:
    """Return the next token of a sequence [1, N] for the logits [V], and its log-probability without the processors."""
    logits = logits.to(dtype=torch.float32, device=ids.device)
    token = int(next_tokens(logits[None].clone(), ids, processors, sample))  # which may write into what they are given
    return token, float(logits[token] - logits.logsumexp(-1))


class _Reader:
    """Reads the unread tokens of one sequence, by the model's own forward or directly."""

    def __init__(self, runner: ModelRunner, watch: Watch, model: Any, model_kwargs: dict[str, Any]):
        self._runner, self._watch, self._model, self._kwargs = runner, watch, model, model_kwargs
        self._passes = 0
        self._direct: DirectSequence | None = None
        self._missed = 0  # passes that the model's keyword arguments do not know of
        # the model and all that holds its decoder, none of which is called in a direct pass
        names = runner.text.findings.decoder.split(".")
        self._around = [model.get_submodule(".".join(names[:count])) for count in range(len(names))]

    def read(self, input_ids: Tensor) -> tuple[Tensor, Callable[[], Trace] | None]:
        """Read a sequence to its end, and return the logits [V] and what makes the trace of the last row."""
        direct, watch = self._direct, self._watch
        if direct is not None:
            if direct.usable and self._may(direct):
                self._missed += 1
                return direct.read(int(input_ids[0, -1]), watch.plan, int(watch.explain))
            self._leave(direct)
        return self._by_model(input_ids)

    def _may(self, direct: DirectDecoder | DirectSequence) -> bool:
        """Return whether nobody follows the model's own calls, and its attention is one whose result is known."""
        known = direct.own_attention or not self._watch.nothing
        return known and self._watch.shares is None and not any(map(watched, self._around))

    def _by_model(self, input_ids: Tensor) -> tuple[Tensor, Callable[[], Trace] | None]:
        model, watch, runner, first = self._model, self._watch, self._runner, self._passes == 0
        wanted = int(watch.explain), watch.plan, watch.shares
        # which makes the masks of a static cache too
        with passes(runner.text, *wanted, runner.backend, read=1) as record:
            inputs = model.prepare_inputs_for_generation(
                input_ids, next_sequence_length=None if first else 1, is_first_iteration=first, **self._kwargs
            )
            outputs = model(**inputs, return_dict=True)
        self._kwargs = model._update_model_kwargs_for_generation(outputs, self._kwargs)
        self._passes += 1
        self._last = record, inputs.get("position_ids")
        cache, logits = self._kwargs[CACHE], outputs.logits[0, -1]
        if self._passes == 2:
            decoder, token = direct_decoder(runner.text, runner.backend), int(input_ids[0, -1])
            positions = inputs.get("position_ids")
            if decoder is not None and self._may(decoder):
                self._direct = DirectSequence.of(decoder, cache, token, positions, logits, watch.plan)
        trace = None
        if watch.explain:
            trace = partial(make_trace, runner.text, record, cache, 1, input_ids.shape[1])
        return logits, trace

    def held(self, length: int) -> tuple[list[Tensor], list[Tensor], int]:
        """Return the keys and values of the sequence, [Hkv, N, D] a site, and the position of its last token."""
        record, positions = self._last
        keys, values = keys_and_values(self._runner.text, record, self._kwargs[CACHE], length)
        return list(keys), list(values), length - 1 if positions is None else last_position(positions)

    def _leave(self, direct: DirectSequence) -> None:
        """Go on with the model's own forward."""
        direct.give_back()
        for _ in range(self._missed):
            output = ModelOutput({CACHE: self._kwargs[CACHE]})
            self._kwargs = self._model._update_model_kwargs_for_generation(output, self._kwargs)
        self._direct, self._missed = None, 0


def end_of(criteria: Any) -> Callable[[Tensor, int], bool]:
    """Return a function of a sequence [1, N] and its last token that says whether the answer ends there.

    Transformers' usual criteria are numbers and ids, which need no tensors; any other is called.
    """
    longest, ends, others = sys.maxsize, set(), []
    for one in criteria:
        if type(one) is MaxLengthCriteria:
            longest = min(longest, one.max_length)
        elif type(one) is EosTokenCriteria:
            ends |= set(one.eos_token_id.flatten().tolist())
        else:
            others.append(one)
    return lambda ids, token: (
        ids.shape[1] >= longest or token in ends or any([bool(one(ids, ()).all()) for one in others])
    )


@contextmanager
def own_state(runner: ModelRunner, state: list[Any]) -> Iterator[None]:
    """Hold the model's lock, and give the model the per-sequence state in `state` while the block runs.

    `Findings.state` names what the model keeps about a sequence. Other calls may have changed it since the last
    block. On leaving, `state` holds the values of this sequence, and the model holds those it had before. An empty
    `state` leaves the model's values as they are on entry.
    """
    model, names = runner.model, runner.text.findings.state
    with model_lock(runner.text), runner.text.inference():
        meet(runner.text)
        outside = [attrgetter(name)(model) for name in names]
        if state:
            _set_state(model, names, state)
        try:
            yield
        finally:
            state[:] = [attrgetter(name)(model) for name in names]
            _set_state(model, names, outside)


def _set_state(model: Any, names: Sequence[str], values: Sequence[Any]) -> None:
    for name, value in zip(names, values, strict=True):
        owner, _, attribute = name.rpartition(".")
        setattr(attrgetter(owner)(model) if owner else model, attribute, value)


# tokens [B], logits [B, V], sequences [B, N], unfinished [B] on the CPU
StepOutput = tuple[Tensor, Tensor, Tensor, Tensor]


def decode_loop(
    session: SharedPrefixDecoder, ids: Sequence[Sequence[int]]
) -> Callable[..., Iterator[StepOutput | None]]:
    """Return a loop that decodes several questions, for transformers' `generate(custom_generate=...)`.

    `generate` prepares logits processors and stopping criteria as it does for its own loops. The loop yields None once
    before the first forward pass, then a `StepOutput` after each.
    """

    def loop(
        model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **_: Any
    ) -> Iterator[StepOutput | None]:
        yield None
        feed: Sequence[Sequence[int]] = ids
        unfinished = torch.ones(len(ids), dtype=torch.bool)
        active = torch.arange(len(ids))  # the questions that the session still reads
        padding = getattr(generation_config, "_pad_token_tensor", None)
        filler = input_ids.new_zeros(()) if padding is None else padding.to(input_ids.device)
        logits: Tensor | None = None
        while True:
            read = session.read(feed).to(dtype=torch.float32, device=input_ids.device)
            if logits is None or len(active) == len(ids):
                logits = read
            else:
                logits = logits.index_copy(0, active.to(logits.device), read)
            tokens = next_tokens(logits, input_ids, logits_processor, generation_config.do_sample)
            if not unfinished.all():
                tokens = torch.where(unfinished.to(tokens.device), tokens, filler)
            input_ids = torch.cat([input_ids, tokens[:, None]], 1)
            going_on = ~stopping_criteria(input_ids, ())
            said, more = torch.stack([tokens, going_on.long()]).cpu()  # the only copy to the CPU in a pass
            unfinished = unfinished & more.bool()
            yield tokens, logits, input_ids, unfinished
            if not unfinished.any():
                return
            going = unfinished[active]
            if 2 * int(going.sum()) <= len(active):  # at least half of the rows are finished
                session.keep(going.nonzero()[:, 0])
                active = active[going]
            feed = said[active][:, None].tolist()

    return loop
