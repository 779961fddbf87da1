"""Prefill: the keys and values of a prompt's tokens, and the logits of the next token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.errors import InputError
from ..core.layout import TokenLayout
from ..knockout.attention_share import AttentionObserver
from ..models.text_model import TextModel
from .decoding import own_state
from .direct_passes import passes
from .kv_cache import cache_of, last_position
from .model_runner import ModelRunner
from .record import Recording
from .trace import keys_and_values


@dataclass(frozen=True)
class Prefill:
    """The result of the forward pass over a prompt.

    Attributes:
        keys, values: Keys and values of all tokens of the prompt, one [Hkv, N, D] a site.
        layout: The layout of the prompt.
        input_ids: Token ids of the prompt, int64 [N], on the CPU.
        position: Position of the next token, for the rotary embedding.
        logits: Logits of the next token, [V].
        causal: Whether every token saw all tokens before it and no other.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    layout: TokenLayout
    input_ids: Tensor
    position: int
    logits: Tensor
    causal: bool


def prefill(runner: ModelRunner, inputs: Any, layout: TokenLayout, watcher: AttentionObserver | None = None) -> Prefill:
    """Run one forward pass over the processor's inputs for one sequence.

    Args:
        runner: The model.
        inputs: The processor's inputs.
        layout: The layout of the prompt.
        watcher: An observer that receives the attention mass, as `shares` of `recording`.
    """
    check_batches(runner.text)
    state: list[Any] = []
    with own_state(runner, state), passes(runner.text, 1, shares=watcher, backend=runner.backend, read=1) as record:
        output = runner.model(**inputs, **runner.whole_cache(), use_cache=True, logits_to_keep=1)
    keys, values = keys_and_values(runner.text, record, cache_of(output), layout.length)
    return Prefill(
        keys=keys,
        values=values,
        layout=layout,
        input_ids=inputs["input_ids"][0].cpu(),
        position=next_position(record, layout.length),
        logits=output.logits[0, -1],
        causal=all(seen is None for passes in record.seen for seen in passes),
    )


def next_position(record: Recording, length: int) -> int:
    """Return the position of the token after the prompt, for the rotary embedding.

    It follows from the position ids that the decoder got in the first forward pass, or is `length` if it got none.
    """
    given = record.positions[0] if record.positions else None
    return length if given is None else last_position(given) + 1


def check_batches(text: TextModel) -> None:
    """Raise InputError if a `Batch` cannot carry what a layer keeps of the image, because it is not keys and values."""
    others = text.findings.others
    if others:
        raise InputError(
            f"this model cannot be served: {len(others)} of its layers are of the class {next(iter(others.values()))},"
            " whose state the server's batches do not hold; VLM.generate, explain and compress work"
        )


def check_sliding(text: TextModel, length: int) -> None:
    """Raise InputError if a sequence in a `Batch` is longer than a sliding window, which a batch does not follow."""
    window = min((site.window for site in text.sites if site.window), default=None)
    if window is not None and length > window:
        raise InputError(
            f"the request takes {length} tokens, and layers of this model see a sliding window of {window}, which the"
            " server's batches do not follow: give a smaller image, a shorter text or fewer new tokens"
        )
