"""Decoding loops that use the logits processors and stopping criteria which transformers' `generate` prepares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .hooks import model_lock
from .kv_cache import CACHE
from .model_runner import ModelRunner
from .sampling import next_tokens
from .shared_prefix import SharedPrefixDecoder

Pass = tuple[int, float, Any, Tensor, bool]  # token id, its log-probability, cache, sequence, whether it is the last


def one_sequence(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **model_kwargs: Any,
) -> Iterator[Any]:
    """Decode one sequence token by token, as a loop for transformers' `generate(custom_generate=...)`.

    `generate` prepares the arguments as it does for its own loops.

    Yields:
        None once, before the first forward pass; then a `Pass` after each forward pass.
    """
    yield None
    done, first = False, True
    while not done:
        inputs = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=None if first else 1, is_first_iteration=first, **model_kwargs
        )
        outputs = model(**inputs, return_dict=True)
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
        token = next_tokens(logits, input_ids, logits_processor, generation_config.do_sample)
        log_prob = logits[0, token[0]] - logits[0].logsumexp(-1)
        input_ids, first = torch.cat([input_ids, token[:, None]], -1), False
        done = bool(stopping_criteria(input_ids, ()).all())
        yield int(token), float(log_prob), model_kwargs[CACHE], input_ids[0], done


@contextmanager
def own_state(runner: ModelRunner, state: list[Any]) -> Iterator[None]:
    """Hold the model's lock, and give the model the per-sequence state in `state` while the block runs.

    `Findings.state` names what the model keeps about a sequence. Other calls may have changed it since the last
    block. On leaving, `state` holds the values of this sequence, and the model holds those it had before. An empty
    `state` leaves the model's values as they are on entry.
    """
    model, names = runner.model, runner.text.findings.state
    with model_lock(runner.text), runner.text.inference():
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
