"""Read a prompt, once: the keys and values of its tokens, and what the model would say next."""

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
    """A prompt as it was read.

    keys, values: of all its tokens, one [Hkv, N, D] a layer. layout, input_ids (int64 [N], on the CPU): of the prompt.
    position: of the next token, for the rotary embedding. logits: of the next token, [V].
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    layout: TokenLayout
    input_ids: Tensor
    position: int
    logits: Tensor


def prefill(runner: ModelRunner, inputs: Any, layout: TokenLayout, watcher: AttentionObserver | None = None) -> Prefill:
    """One pass over a processor's inputs for one sequence; `watcher` as in `recording`."""
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
    """Raise InputError for a cache that does not hold all keys and values as they are."""
    for layer in cache.layers:
        keys = getattr(layer, "keys", None)
        if not isinstance(keys, Tensor) or keys.shape[-2] < length or not isinstance(layer.values, Tensor):
            raise InputError(
                f"a {type(layer).__name__} does not hold all keys and values as they are: leave cache_implementation at"
                " transformers' default"
            )


def next_position(record: Recording, length: int) -> int:
    """Of the token after the prompt, for the rotary embedding, from what the first pass gave the decoder."""
    given = record.positions[0] if record.positions else None
    if given is None:
        return length
    if given.ndim == 3 and len(given) == 4:  # three axes, behind a row that only makes masks
        given = given[1:]
    return int(given[..., -1].max()) + 1


def check_full_attention(runner: ModelRunner) -> None:
    """Raise InputError where a layer does not see the whole sequence: there a dropped token would move the window."""
    kinds = set(getattr(runner.text.config, "layer_types", None) or ["full_attention"])
    window = getattr(runner.text.config, "sliding_window", None)
    if kinds != {"full_attention"} or (window and getattr(runner.text.config, "use_sliding_window", True)):
        raise InputError(
            f"layers of type {', '.join(sorted(kinds))} with a sliding window of {window} cannot be compressed: a"
            " dropped token would move the window; use a model with full attention"
        )
