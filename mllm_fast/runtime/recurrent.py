"""The state of layers that mix positions without attention (recurrent and convolution layers of hybrid models).

Such a layer reads what it keeps of earlier positions from its layer of the cache. The state is everything that this
object holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from ..core.errors import InputError
from ..models.text_model import TextModel
from .attention import Scoring
from .hooks import recording
from .kv_cache import CACHE, full_cache
from .record import Recording
from .shared_prefix import SharedPrefixDecoder
from .trace import Trace

# older releases of transformers continue from a state by one token a pass only
_GOES_ON = "conv_kernel_size" in signature(LinearAttentionLayer.update_conv_state).parameters
State = dict[int, dict[str, Any]]  # by layer of the cache, its attributes


def check_state(text: TextModel) -> None:
    """Raise InputError if a hybrid model is given, and transformers cannot read several tokens from a state."""
    if text.findings.others and not _GOES_ON:
        raise InputError(
            "contexts of a model with layers without attention need a newer release of transformers, which reads"
            " several tokens from a state: pip install --upgrade transformers (5.24 does)"
        )


def state_of(cache: Any, text: TextModel) -> State:
    """Return a copy of the state of the layers of a cache that hold no keys and values."""
    attention = {site.cache for site in text.sites}
    return {i: _copy(vars(layer)) for i, layer in enumerate(cache.layers) if i not in attention}


def cache_with(state: State, text: TextModel) -> Any:
    """Return a cache with a copy of a state, whose other layers are empty."""
    cache = full_cache(text)
    for i, attributes in state.items():
        vars(cache.layers[i]).update(_copy(attributes))
    return cache


def tensors_of(state: State) -> dict[str, Tensor]:
    """Return the tensors of a state, by names that tell the layer, the attribute and the key in it."""
    found: dict[str, Tensor] = {}
    for i, attributes in state.items():
        for name, value in attributes.items():
            parts = value if isinstance(value, dict) else {"": value}
            found |= {f"{i}.{name}.{key}": part for key, part in parts.items() if isinstance(part, Tensor)}
    return found


def plain_of(state: State) -> list[list[Any]]:
    """Return what a state holds beside tensors, as JSON: [layer, attribute, key or null, value]."""
    plain = (bool, int, float, str)
    found: list[list[Any]] = []
    for i, attributes in state.items():
        for name, value in attributes.items():
            if isinstance(value, dict):
                found += [[i, name, key, part] for key, part in value.items() if isinstance(part, plain)]
            elif isinstance(value, plain):
                found.append([i, name, None, value])
    return found


def state_from(plain: list[list[Any]], tensors: dict[str, Tensor], text: TextModel) -> State:
    """Return the state that `plain_of` and `tensors_of` described."""
    empty = full_cache(text)
    state: State = {}
    for i in sorted({entry[0] for entry in plain} | {int(name.split(".")[0]) for name in tensors}):
        state[i] = _copy(vars(empty.layers[i]))
    entries = [*plain, *((*_parsed(name), tensor) for name, tensor in tensors.items())]
    for i, name, key, value in entries:
        if key is None:
            state[i][name] = value
        else:
            state[i][name][key] = value
    for attributes in state.values():
        parts = [part for value in attributes.values() if isinstance(value, dict) for part in value.values()]
        held = [part for part in parts if isinstance(part, Tensor)]
        if held and "device" in attributes:
            attributes |= {"device": held[0].device, "dtype": held[0].dtype}
    return state


def _parsed(name: str) -> tuple[int, str, int | None]:
    layer, attribute, key = name.split(".")
    return int(layer), attribute, int(key) if key else None


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return {key: _copy(part) for key, part in value.items()} if isinstance(value, dict) else value


class RecurrentPrefixDecoder(SharedPrefixDecoder):
    """Questions over the prefix of a hybrid model, each with a state of its own.

    The layers without attention read one question at a time, so a pass runs the model once a question.

    Args:
        state: The state after the prefix.
        others: The arguments of `SharedPrefixDecoder`.
    """

    def __init__(
        self,
        state: State,
        text: TextModel,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        position: int,
        count: int,
        backend: str = "auto",
        places: tuple[Tensor, int] | None = None,
    ):
        super().__init__(text, keys, values, position, count, backend, places=places)
        self._each = [
            _One(cache_with(state, text), text, keys, values, position, 1, backend, places=places) for _ in range(count)
        ]
        self._current = self._each[0]

    @contextmanager
    def recording(self, rows: int = 0) -> Iterator[Recording]:
        with recording(self.text, rows, backend=self.backend, attention_fn=self.attend) as record:
            yield record

    def read(self, ids: Sequence[Sequence[int]]) -> Tensor:
        logits = []
        for one, tokens in zip(self._each, ids, strict=True):
            self._current = one
            logits.append(one.read([tokens]))
        self.length = max(one.length for one in self._each)
        return torch.cat(logits)

    def attend(self, site: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        return self._current.attend(site, query, key, value, scoring)

    def mark(self) -> Any:
        return [one.mark() for one in self._each]

    def back(self, mark: Any) -> None:
        for one, before in zip(self._each, mark, strict=True):
            one.back(before)
        self.length = max(one.length for one in self._each)

    def keep(self, questions: Tensor) -> None:
        self._each = [self._each[i] for i in questions.tolist()]

    def trace(self, record: Recording, num_tokens: int, length: int, positions: Tensor) -> Trace:
        return self._each[0].trace(record, num_tokens, length, positions)

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self._each)


class _One(SharedPrefixDecoder):
    """One question, whose state lies in a cache of its own."""

    def __init__(self, cache: Any, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._cache = cache

    def _decode(self, tokens: Tensor, positions: Tensor) -> Tensor:
        found = self.text.decoder(input_ids=tokens, position_ids=positions, use_cache=True, **{CACHE: self._cache})
        return found.last_hidden_state

    def attend(self, site: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        # the cache hands over all own keys; the earlier ones are kept here already
        count = query.shape[2]
        return super().attend(site, query, key[:, :, -count:], value[:, :, -count:], scoring)

    def mark(self) -> Any:
        return super().mark(), state_of(self._cache, self.text)

    def back(self, mark: Any) -> None:
        before, state = mark
        super().back(before)
        self._cache = cache_with(state, self.text)
