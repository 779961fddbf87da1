"""Prefill: the keys and values of a prompt's tokens, and the logits of the next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.errors import InputError
from ..core.layout import TokenLayout
from ..knockout.attention_share import AttentionObserver
from ..models.text_model import TextModel
from .decoding import own_state
from .direct_decoder import DirectDecoder, direct_decoder
from .direct_passes import Deferred, passes
from .direct_sequence import placed
from .hooks import model_lock
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


class PrefillInPieces:
    """The forward pass over a prompt, read piece by piece where the layers are run directly.

    Args:
        runner: The model.
        inputs: The processor's inputs for one sequence.
        layout: The layout of the prompt.
        watcher: An observer that receives the attention mass, as `shares` of `recording`.
    """

    def __init__(self, runner: ModelRunner, inputs: Any, layout: TokenLayout, watcher: AttentionObserver | None = None):
        self._runner, self._inputs, self._layout, self._watcher = runner, inputs, layout, watcher
        self._left: tuple[Tensor, Sequence[int] | Tensor] | None = None  # input rows of the layers, and positions
        self._read = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    @property
    def begun(self) -> bool:
        """Whether a first piece was read."""
        return self._left is not None

    def read(self, rows: int | None = None) -> Prefill | None:
        """Read the next rows, and return the result once all were read.

        The first call with a number of rows runs the vision tower alone. A model whose layers are not run directly
        reads all in it.

        Args:
            rows: At most how many; None for all that are left.
        """
        runner = self._runner
        if self._left is None and rows is not None:
            try:
                return self._whole(defer=True)
            except Deferred as left:
                self._left = left.hidden, left.positions  # without the frames that the exception holds
                return None  # the vision tower was a piece by itself
        decoder = None
        if self._left is not None:
            with model_lock(runner.text):
                decoder = direct_decoder(runner.text, runner.backend)
        if decoder is None or self._left is None:  # the model itself reads all, also if it has changed meanwhile
            return self._whole()
        with model_lock(runner.text), runner.text.inference():
            return self._piece(decoder, *self._left, rows)

    def _piece(
        self, decoder: DirectDecoder, hidden: Tensor, positions: Sequence[int] | Tensor, rows: int | None
    ) -> Prefill | None:
        start = self._read
        count = len(hidden)
        stop = count if rows is None else min(count, start + rows)
        if not self._keys:
            shape = 1, decoder.kv_heads, count, decoder.width
            made = [hidden.new_empty(shape) for _ in range(2 * decoder.num_layers)]
            self._keys, self._values = made[::2], made[1::2]
        store, part = placed(self._keys, self._values, start, stop)
        part_of = positions[..., start:stop] if isinstance(positions, Tensor) else positions[start:stop]
        needed = [stop - start - 1] if stop == count else []
        found = decoder(hidden[start:stop], part_of, store, [part], needed=needed)
        self._read = stop
        if stop < count:
            return None
        last = last_position(positions) if isinstance(positions, Tensor) else positions[-1]
        return Prefill(
            keys=tuple(one[0] for one in self._keys),
            values=tuple(one[0] for one in self._values),
            layout=self._layout,
            input_ids=self._inputs["input_ids"][0].cpu(),
            position=last + 1,
            logits=decoder.logits(found.normed)[0],
            causal=True,
        )

    def _whole(self, defer: bool = False) -> Prefill:
        """Run one forward pass of the model over all rows, or up to its layers; see `direct_passes.passes`."""
        runner, inputs, length, state = self._runner, self._inputs, self._layout.length, []  # type: ignore[var-annotated]
        check_batches(runner.text)
        observed = passes(runner.text, 1, None, self._watcher, runner.backend, read=1, defer=defer)
        with own_state(runner, state), observed as record:
            output = runner.model(**inputs, **runner.whole_cache(), use_cache=True, logits_to_keep=1)
        keys, values = keys_and_values(runner.text, record, cache_of(output), length)
        return Prefill(
            keys=keys,
            values=values,
            layout=self._layout,
            input_ids=inputs["input_ids"][0].cpu(),
            position=next_position(record, length),
            logits=output.logits[0, -1],
            causal=all(seen is None for one in record.seen for seen in one),
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
