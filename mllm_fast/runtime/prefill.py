"""Prefill: the keys and values of a prompt's tokens, and the logits of the next token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.errors import InputError
from ..core.layout import TokenLayout
from ..knockout.attention_share import AttentionObserver
from .decoding import own_state
from .hooks import Recording, recording
from .kv_cache import cache_of
from .model_runner import ModelRunner


@dataclass(frozen=True)
class Prefill:
    """The result of the forward pass over a prompt.

    Attributes:
        keys, values: Keys and values of all tokens of the prompt, one [Hkv, N, D] a layer.
        layout: The layout of the prompt.
        input_ids: Token ids of the prompt, int64 [N], on the CPU.
        position: Position of the next token, for the rotary embedding.
        logits: Logits of the next token, [V].
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    layout: TokenLayout
    input_ids: Tensor
    position: int
    logits: Tensor


def prefill(runner: ModelRunner, inputs: Any, layout: TokenLayout, watcher: AttentionObserver | None = None) -> Prefill:
    """Run one forward pass over the processor's inputs for one sequence.

    Args:
        runner: The model.
        inputs: The processor's inputs.
        layout: The layout of the prompt.
        watcher: An observer that receives the attention mass, as `shares` of `recording`.
    """
    state: list[Any] = []
    with own_state(runner, state), recording(runner.text, 1, shares=watcher, backend=runner.backend) as record:
        output = runner.model(**inputs, use_cache=True, logits_to_keep=1)
    cache, length = cache_of(output), layout.length
    check_cache(cache, length)
    return Prefill(
        keys=tuple(layer.keys[0, :, :length] for layer in cache.layers),
        values=tuple(layer.values[0, :, :length] for layer in cache.layers),
        layout=layout,
        input_ids=inputs["input_ids"][0].cpu(),
        position=next_position(record, length),
        logits=output.logits[0, -1],
    )


def check_cache(cache: Any, length: int) -> None:
    """Raise InputError for a cache that does not hold the keys and values of all `length` tokens as tensors."""
    for layer in cache.layers:
        keys = getattr(layer, "keys", None)
        if not isinstance(keys, Tensor) or keys.shape[-2] < length or not isinstance(layer.values, Tensor):
            raise InputError(
                f"a {type(layer).__name__} does not hold all keys and values as they are: leave cache_implementation at"
                " transformers' default"
            )


def next_position(record: Recording, length: int) -> int:
    """Return the position of the token after the prompt, for the rotary embedding.

    It follows from the position ids that the decoder got in the first forward pass, or is `length` if it got none.
    """
    given = record.positions[0] if record.positions else None
    if given is None:
        return length
    if given.ndim == 3 and len(given) == 4:  # the first row is only for masks, the other three are the axes
        given = given[1:]
    return int(given[..., -1].max()) + 1


def check_full_attention(runner: ModelRunner) -> None:
    """Raise InputError if a layer has sliding-window attention, in which dropping a token would move the window."""
    kinds = set(getattr(runner.text.config, "layer_types", None) or ["full_attention"])
    window = getattr(runner.text.config, "sliding_window", None)
    if kinds != {"full_attention"} or (window and getattr(runner.text.config, "use_sliding_window", True)):
        raise InputError(
            f"layers of type {', '.join(sorted(kinds))} with a sliding window of {window} cannot be compressed: a"
            " dropped token would move the window; use a model with full attention"
        )
