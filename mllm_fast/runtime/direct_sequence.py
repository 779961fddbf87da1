"""One sequence that a direct decoder goes on with, over the keys and values that the model left in its cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..kernels.decoder_layers import DecoderOutput, KeyStore, Part
from ..kernels.knockout_attention.reference import open_pairs
from ..knockout.plan import Plan
from ..models.norms import relative_error
from .attention import Scoring
from .direct_decoder import DirectDecoder, allowed
from .kv_cache import last_position
from .trace import Trace

ROOM = 64  # positions that are allocated ahead


class DirectSequence:
    """A sequence in progress. The keys and values lie in arrays with room for the next ones.

    Args:
        decoder: The direct decoder.
        cache: The model's KV cache.
        length: How many of its positions count.
        shift: By how much the position of a token differs from the number of tokens before it.
    """

    def __init__(self, decoder: DirectDecoder, cache: Any, length: int, shift: int):
        self._decoder, self._cache = decoder, cache
        self.length, self._shift = length, shift
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._make_room([layer.keys for layer in cache.layers], [layer.values for layer in cache.layers])

    @classmethod
    def of(
        cls,
        decoder: DirectDecoder,
        cache: Any,
        token: int,
        position_ids: Tensor | None,
        logits: Tensor,
        plan: Plan | None,
    ) -> DirectSequence | None:
        """Return the sequence of a cache, or None if it has to be read by the model itself.

        Args:
            decoder: The direct decoder.
            cache: The model's KV cache.
            token: The last token that was read into it.
            position_ids: Its position ids, or None where they follow from the cache.
            logits: The model's logits after it, [V]; they are computed once more here, and compared.
            plan: The plan of the knockouts under which it was read.
        """
        if not fits(decoder, cache):
            return None
        length = cache.layers[0].keys.shape[2]
        at = length - 1 if position_ids is None else last_position(position_ids)
        made = cls(decoder, cache, length - 1, at - (length - 1))
        found, _ = made.read(token, plan, 0)
        off = relative_error(found, logits.double())
        if not off < allowed(decoder.dtype):
            warnings.warn(
                f"the layers that are run directly give other logits than the model itself (by {off:.2g} of them); its"
                " own forward reads this answer",
                stacklevel=2,
            )
            return None
        made.give_back()  # which frees the model's own
        return made

    @property
    def usable(self) -> bool:
        """Whether the decoder is still as it was when it was checked, and no position is outside a window."""
        window = self._decoder.window
        return self._decoder.usable and (window is None or self.length < window)

    @property
    def own_attention(self) -> bool:
        """See `DirectDecoder`."""
        return self._decoder.own_attention

    def read(self, token: int, plan: Plan | None, rows: int) -> tuple[Tensor, Callable[[], Trace] | None]:
        """Read a token, and return the logits after it, [V], and what makes the trace of its row if `rows` is 1."""
        at, count = self.length, self.length + 1
        if at == self._keys[0].shape[2]:
            self._make_room(self._keys, self._values)
        decoder = self._decoder
        store, part = placed(self._keys, self._values, at, count, closed_masks(plan, count))
        found = decoder(decoder.embed([token]), [at + self._shift], store, [part], range(rows))
        self.length = count
        trace = _Row(found, decoder, tuple(self._keys), tuple(self._values), count, plan).trace if rows else None
        return decoder.logits(found.normed)[0], trace

    def give_back(self) -> None:
        """Give the layers of the cache all keys and values, as views; the model may go on from there."""
        for layer, keys, values in zip(self._cache.layers, self._keys, self._values, strict=True):
            layer.keys, layer.values = keys[:, :, : self.length], values[:, :, : self.length]

    def _make_room(self, keys: list[Tensor], values: list[Tensor]) -> None:
        room = self.length + max(ROOM, self.length // 2)
        self._keys, self._values = ([_grown(one, self.length, room) for one in many] for many in (keys, values))


class _Row:
    """What one pass left of the row that is explained."""

    def __init__(self, found: DecoderOutput, decoder: DirectDecoder, keys: Any, values: Any, count: int, plan: Any):
        self.found, self.decoder, self.keys, self.values, self.count, self.plan = (
            found, decoder, keys, values, count, plan,
        )  # fmt: skip

    def trace(self) -> Trace:
        found, count = self.found, self.count
        seen = [seen_rows(mask, count - 1) for mask in closed_masks(self.plan, count)]
        return Trace(
            residual=found.residual,  # type: ignore[arg-type]
            query=found.query,  # type: ignore[arg-type]
            output=found.output,  # type: ignore[arg-type]
            final=found.hidden,
            keys=tuple(one[0, :, :count] for one in self.keys),
            values=tuple(one[0, :, :count] for one in self.values),
            rows=range(count - 1, count),
            seen=tuple(None if one is None else one[0] for one in seen) or (None,) * len(self.keys),
            scoring=tuple(Scoring(scale) for scale in self.decoder.scales),
        )


def fits(decoder: DirectDecoder, cache: Any) -> bool:
    """Return whether a cache holds all keys and values of one sequence, as they are."""
    layers: Any = getattr(cache, "layers", ())
    if len(layers) != decoder.num_layers or any(type(layer) is not DynamicLayer for layer in layers):
        return False
    keys = layers[0].keys
    if not isinstance(keys, Tensor) or keys.ndim != 4:
        return False
    length = int(keys.size(2))
    shape = (1, decoder.kv_heads, length, decoder.width)
    return all(
        one is not None and one.shape == shape and one.dtype == decoder.dtype and one.device.type == "cpu"
        for layer in layers
        for one in (layer.keys, layer.values)
    )


def _grown(held: Tensor, length: int, room: int) -> Tensor:
    wide = held.new_empty(*held.shape[:2], room, held.shape[3])
    wide[:, :, :length] = held[:, :, :length]
    return wide


def placed(
    keys: Sequence[Tensor], values: Sequence[Tensor], start: int, stop: int, masks: Sequence[Any] = ()
) -> tuple[KeyStore, Part]:
    """Return where the rows from `start` to `stop` of one sequence put their keys, and what each of them sees."""
    place = torch.arange(start, stop)
    row, zero = place - start, torch.zeros_like(place)
    store = KeyStore(keys, values, torch.stack([zero, place], 1))
    return store, Part(keys, values, torch.stack([row, zero, zero, place + 1, place], 1), masks)


def closed_masks(plan: Plan | None, count: int) -> list[tuple[Tensor, Tensor] | None]:
    """Return segments and table of the knockouts of each layer over `count` keys, or nothing for no plan."""
    if plan is None:
        return []
    return [None if rules is None else (rules.segments(1, count), rules.table) for rules in plan.layers]


def seen_rows(mask: tuple[Tensor, Tensor] | None, first: int) -> Tensor | None:
    """Return which keys the rows from `first` on see under the mask of a layer, bool [1, T, N], or None for all."""
    if mask is None:
        return None
    segments, table = mask
    count = segments.shape[1]
    causal = torch.arange(count) <= torch.arange(first, count)[:, None]
    return open_pairs(segments[:, first:], segments, table) & causal
