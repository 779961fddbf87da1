"""The passes of a model whose decoder is run by `DirectDecoder`, the first one over the prompt included.

Inside `with passes(...)` the decoder's `forward` is replaced. A pass that is understood runs the layers directly:
one sequence, plain causal attention, keys and values in transformers' own dynamic cache. Any other runs the model's own
forward, which `hooks.recording` follows. When the block ends, also by an exception, the decoder is restored.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..kernels.decoder_layers import DecoderOutput
from ..knockout.attention_share import AttentionObserver
from ..knockout.plan import Plan
from ..models.linears import device_of_linear
from ..models.text_model import TextModel
from .direct_decoder import DirectDecoder, direct_decoder
from .direct_sequence import ROOM, closed_masks, fits, placed, seen_rows
from .hooks import model_lock, recording
from .kv_cache import CACHE
from .record import Recording
from .row_mask import RowMask

_MOST = 1024  # rows of a pass: with more, the attention of whole blocks saves more than the calls cost
# arguments of a decoder that a pass here reads; any other one has to be None or False
_READ = (
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", CACHE, "use_cache", "cache_position", "return_dict",
)  # fmt: skip


class Deferred(BaseException):  # not to be taken for an error of the model's
    """Ends a pass over a prompt before its layers; what is left is for the caller to run.

    Attributes:
        hidden: The input rows of the layers, [T, d].
        positions: Their positions, or position ids [axes, 1, T].
    """

    def __init__(self, hidden: Tensor, positions: Sequence[int] | Tensor):
        super().__init__()
        self.hidden, self.positions = hidden, positions


@contextmanager
def passes(
    text: TextModel,
    rows: int = 0,
    knockouts: Plan | None = None,
    shares: AttentionObserver | None = None,
    backend: str = "auto",
    read: int | nn.Module | None = None,
    defer: bool = False,
) -> Iterator[Recording]:
    """Run a model's passes directly where they can be, and record the last `rows` rows of each.

    Args:
        text: The text part of a model.
        rows, knockouts, shares, backend: As in `hooks.recording`.
        read: How many of the last rows of each pass the caller reads, `rows` or more, or the model whose argument
            `logits_to_keep` says so; None for all. A pass that is run directly gives NaN for the others.
        defer: Raise `Deferred` in place of running a prompt's layers directly.

    Yields:
        The `Recording`.
    """
    nothing = rows == 0 and knockouts is None and shares is None
    with model_lock(text):
        found = direct_decoder(text, backend)
        if found is not None and nothing and not found.own_attention:
            found = None
        unrecorded = nullcontext(Recording(0, len(text.layers), len(text.sites), device_of_linear(text.head)))
        with unrecorded if nothing else recording(text, rows, knockouts, shares, backend) as record:
            if found is None:
                yield record
                return
            asked = read if isinstance(read, nn.Module) else None
            run = _Passes(text, found, record, knockouts, shares, None if isinstance(read, nn.Module) else read)
            before = vars(text.decoder).get("forward")
            run.otherwise, run.defer = text.decoder.forward, defer
            handle = None if asked is None else asked.register_forward_pre_hook(run.note_rows, with_kwargs=True)
            try:
                vars(text.decoder)["forward"] = run
                yield record
            finally:
                if handle is not None:
                    handle.remove()
                vars(text.decoder).pop("forward", None)
                if before is not None:
                    vars(text.decoder)["forward"] = before


class _Passes:
    """What replaces the `forward` of a decoder."""

    def __init__(
        self,
        text: TextModel,
        decoder: DirectDecoder,
        record: Recording,
        plan: Plan | None,
        shares: AttentionObserver | None,
        read: int | None,
    ):
        self._text, self._decoder, self._record = text, decoder, record
        self._plan, self._shares, self._read = plan, shares, read
        self.otherwise: Any = None
        self.defer = False
        self._keys: list[Tensor] = []  # [1, Hkv, room, D] each, whose beginning the cache shows
        self._values: list[Tensor] = []
        self._shown: list[Tensor] = []  # the keys of the cache after the last pass

    def note_rows(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note how many rows a call of the model wants the logits of."""
        kept = kwargs.get("logits_to_keep")
        self._read = max(kept, self._record.rows) if type(kept) is int and kept > 0 else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a pass, as transformers calls the decoder."""
        cache = kwargs.get(CACHE)
        length = self._length(cache)
        if args or length is None or not self._understood(kwargs, length):
            return self.otherwise(*args, **kwargs)
        embeds = kwargs.get("inputs_embeds")
        hidden = self._decoder.embed(kwargs["input_ids"][0]) if embeds is None else embeds[0]
        count = len(hidden)
        given = kwargs.get("position_ids")
        positions = range(length, length + count) if given is None else given if given.ndim == 3 else given[0].tolist()
        if self.defer and not length:
            raise Deferred(hidden, positions)
        if cache is None and kwargs.get("use_cache", self._text.config.use_cache):
            cache = DynamicCache(config=self._text.config)
        found = self._run(hidden, positions, cache, length)
        last = found.normed
        if len(last) < count:
            last = torch.full_like(hidden, torch.nan)
            last[-len(found.normed) :] = found.normed
        return BaseModelOutputWithPast(**{"last_hidden_state": last[None], CACHE: cache})

    def _length(self, cache: Any) -> int | None:
        """Return how many positions a cache holds, or None if it is none that can be gone on with."""
        if cache is None:
            return 0
        layers: Any = getattr(cache, "layers", ())
        if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in layers):
            return None
        if all(layer.keys is None or layer.keys.numel() == 0 for layer in layers):
            return 0 if len(layers) in (0, self._decoder.num_layers) else None
        return int(layers[0].keys.size(2)) if fits(self._decoder, cache) else None

    def _understood(self, kwargs: dict[str, Any], length: int) -> bool:
        """Return whether a pass is one that the direct decoder computes."""
        decoder, config = self._decoder, self._text.config
        others = (one for name, one in kwargs.items() if name not in _READ)
        if any(one is not None and one is not False for one in others) or kwargs.get("return_dict") is False:
            return False
        if config.output_attentions or config.output_hidden_states or torch.is_grad_enabled():
            return False
        if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return False
        embeds, ids = kwargs.get("inputs_embeds"), kwargs.get("input_ids")
        if (embeds is None) == (ids is None):
            return False
        given = ids if embeds is None else embeds
        assert given is not None
        batch, count = int(given.size(0)), int(given.size(1))
        most = sys.maxsize if self.defer else _MOST
        if batch != 1 or not 0 < count <= most or (embeds is not None and embeds.dtype != decoder.dtype):
            return False
        positions = kwargs.get("position_ids")
        if positions is not None and not self._known(positions, count):
            return False
        if decoder.window is not None and length + count > decoder.window:
            return False
        wanted = self._shares is not None and self._shares.wants(length, count) is not False
        return not wanted and _causal(kwargs.get("attention_mask"), length + count)

    def _known(self, positions: Tensor, count: int) -> bool:
        """Return whether position ids, [1, T] or [axes, 1, T], are such as the direct decoder reads."""
        shape = tuple(positions.shape)
        return shape == (1, count) or (shape[1:] == (1, count) and shape[0] in self._decoder.axes)

    def _run(self, hidden: Tensor, positions: Any, cache: DynamicCache | None, length: int) -> DecoderOutput:
        """Run the layers on T rows behind `length` others, and give the cache their keys and values."""
        count, decoder, record = len(hidden), self._decoder, self._record
        self._make_room(cache, length, length + count)
        masks = closed_masks(self._plan, length + count)
        store, part = placed(self._keys, self._values, length, length + count, masks)
        recorded = range(count)[-record.rows :] if record.rows else range(0)
        needed = range(count) if self._read is None else range(count)[-self._read :]
        found = decoder(hidden, positions, store, [part], recorded, needed)
        if cache is not None:
            self._show(cache, length, length + count)
        if recorded:
            seen = [seen_rows(mask, length + recorded.start) for mask in masks] or [None] * decoder.num_layers
            record.add(found, [row - needed.start for row in recorded], decoder.scales, seen, length + count - 1)
        return found

    def _make_room(self, cache: DynamicCache | None, length: int, stop: int) -> None:
        """Have room for the keys and values up to `stop` behind those of the cache."""
        layers: list[Any] = cache.layers if cache is not None and length else []  # type: ignore[assignment]
        ours = bool(self._shown) and all(a.keys is b for a, b in zip(layers, self._shown, strict=False))
        if layers and ours and stop <= self._keys[0].shape[2]:
            return
        room = stop + ROOM if length else stop  # who keeps a prompt's keys keeps no more
        shape = 1, self._decoder.kv_heads, room, self._decoder.width
        made = [torch.empty(shape, dtype=self._decoder.dtype) for _ in range(2 * self._decoder.num_layers)]
        self._keys, self._values = made[::2], made[1::2]
        for layer, keys, values in zip(layers, self._keys, self._values, strict=bool(layers)):
            keys[:, :, :length], values[:, :, :length] = layer.keys, layer.values

    def _show(self, cache: DynamicCache, before: int, length: int) -> None:
        """Give the layers of a cache, which held `before` positions, their keys and values, as views."""
        self._shown = []
        for i, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
            if not before:
                cache.update(keys[:, :, :0], values[:, :, :0], i)
            layer: Any = cache.layers[i]
            layer.keys, layer.values = keys[:, :, :length], values[:, :, :length]
            self._shown.append(layer.keys)


def _causal(mask: Any, keys: int) -> bool:
    """Return whether a mask lets every row see all tokens before it, and no other."""
    if mask is None:
        return True
    if isinstance(mask, RowMask):
        return mask.causal and mask.keys == keys
    return isinstance(mask, Tensor) and mask.shape == (1, keys) and bool(mask.all())
