"""The operators M = W_U diag(g) O of the factored way, and a cache of them within a byte budget."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from threading import Lock

import torch
from torch import Tensor

from ..dispatch import wide_type
from .unembedding import Unembedding


def make_operator(unembedding: Unembedding, projection: Tensor, centred: bool) -> Tensor:
    """M [V, k] = W_U diag(g) O for a projection O [d, k], with O's columns centred if `centred` (a layer
    norm with its own statistics takes the mean off). In the unembedding's dtype; computed in float32 or
    wider. Stored as `with_longest` does."""
    wide = wide_type(unembedding.weight.dtype)
    columns = projection.to(wide)
    if centred:
        columns = columns - columns.mean(0)
    return with_longest(unembedding.times(columns), unembedding.weight.dtype)


def with_longest(operator: Tensor, dtype: torch.dtype) -> Tensor:
    """An operator [V, k] in `dtype`. If that has two bytes, so that tensor cores read it, and their count is even, so
    that a float32 fits behind them, the length of its longest row is there, where `triton_moments` looks for it."""
    if dtype.itemsize != 2 or operator.numel() % 2:
        return operator.to(dtype).contiguous()
    room = torch.empty(operator.numel() + 2, dtype=dtype, device=operator.device)
    stored = room[:-2].view(operator.shape)
    stored.copy_(operator)
    room[-2:].view(torch.float32).copy_(torch.linalg.vector_norm(stored, dim=1, dtype=torch.float32).max())
    return stored


class Together(list[Tensor]):
    """Operators of one call that are all at hand. table: their addresses on the device, once a kernel has put them
    there; the next call for the same operators finds both."""

    table: Tensor | None = None


class OperatorCache:
    """Operators by key, at most `budget` bytes of them, least recently used out first.

    A key names a projection and the state of its weights (`weight_state`), so that an operator made before a
    training step is not used after it; the state of the unembedding is added to it here.
    """

    def __init__(self, budget: int):
        if budget < 0:
            raise ValueError(f"budget is a number of bytes >= 0, got {budget}")
        self.budget = budget
        self.nbytes = 0
        self._entries: OrderedDict[Hashable, Tensor] = OrderedDict()
        # the keys of the last call that found all: looking a thousand up takes longer than scoring some of them
        self._last: tuple[Sequence[Hashable], Together] | None = None
        self._lock = Lock()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    @staticmethod
    def state(unembedding: Unembedding, centred: bool) -> Hashable:
        """What else the operators are made of."""
        weights = [w for w in (unembedding.weight, unembedding.gain) if w is not None]
        return (centred, *map(weight_state, weights))

    def find(self, keys: Sequence[Hashable], state: Hashable) -> list[Tensor | None] | Together:
        """The operators of keys, None where one is not in the cache; if all are there, together."""
        named = [*keys, state]
        with self._lock:
            if self._last is not None and self._last[0] == named:  # they are the most recent ones already
                return self._last[1]
            found: list[Tensor | None] = []
            for key in keys:
                operator = self._entries.get((key, state))
                if operator is not None:
                    self._entries.move_to_end((key, state))
                found.append(operator)
            here = [one for one in found if one is not None]
            if not here or len(here) < len(found):
                self._last = None  # others are the most recent now
                return found
            self._last = named, Together(here)
            return self._last[1]

    def get(self, full: Hashable, unembedding: Unembedding, projection: Tensor, centred: bool) -> Tensor:
        """The operator of a key and state, from the cache or made now; kept if it fits the budget at all."""
        with self._lock:
            operator = self._entries.get(full)
            self._last = None
            if operator is not None:
                self._entries.move_to_end(full)
                return operator
        operator = make_operator(unembedding, projection, centred)
        with self._lock:
            self._last = None
            if operator.nbytes <= self.budget and full not in self._entries:
                self._entries[full] = operator
                self.nbytes += operator.nbytes
                while self.nbytes > self.budget:
                    _, oldest = self._entries.popitem(last=False)
                    self.nbytes -= oldest.nbytes
        return operator

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._last, self.nbytes = None, 0


class Operators:
    """The operator of each group, made or taken from the cache when it is asked for.

    projection: O of each group, [G, d, k] or G of [d, k]. cache, keys: a cache and the G keys there, or neither.
    dtype, nbytes: of one operator.
    """

    def __init__(
        self,
        unembedding: Unembedding,
        projection: Tensor | Sequence[Tensor],
        centred: bool,
        cache: OperatorCache | None,
        keys: Sequence[Hashable] | None,
    ):
        self.unembedding, self.projection, self.centred = unembedding, projection, centred
        self.cache, self.keys = cache, keys
        self.state = OperatorCache.state(unembedding, centred)
        # those of the cache, until they are asked for: others that are made meanwhile may push them out of it
        self._found: list[Tensor | None] | Together = [None] * len(projection)
        if cache is not None and keys is not None:
            self._found = cache.find(keys, self.state)
        weight = unembedding.weight
        self.dtype = weight.dtype
        self.nbytes = weight.shape[0] * projection[0].shape[1] * weight.element_size() if len(projection) else 0

    def __len__(self) -> int:
        return len(self.projection)

    def __getitem__(self, group: int) -> Tensor:
        found = self._found[group]
        if found is not None:
            if not isinstance(self._found, Together):
                self._found[group] = None
            return found
        if self.cache is None or self.keys is None:
            return make_operator(self.unembedding, self.projection[group], self.centred)
        full = self.keys[group], self.state
        return self.cache.get(full, self.unembedding, self.projection[group], self.centred)

    @property
    def together(self) -> Together | None:
        """All of them, where none must be made."""
        return self._found if isinstance(self._found, Together) else None

    @property
    def to_make(self) -> int:
        """How many are not at hand."""
        return 0 if self.together is not None else sum(one is None for one in self._found)

    def at_hand(self, group: int) -> bool:
        """Whether an operator need not be made."""
        return self._found[group] is not None


def held_together(operators: Operators, most_made: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Runs of groups, and their operators: of those that must be made at most `most_made` bytes at a time."""
    if operators.together is not None:
        yield slice(0, len(operators)), operators.together
        return
    first, made = 0, 0
    held: list[Tensor] = []
    for g in range(len(operators)):
        size = 0 if operators.at_hand(g) else operators.nbytes
        if held and made + size > most_made:
            yield slice(first, g), held
            first, made, held = g, 0, []
        held.append(operators[g])
        made += size
    if held:
        yield slice(first, len(operators)), held


def weight_state(weight: Tensor) -> Hashable:
    """What tells a weight, and its value after an in-place change, from any other."""
    # an inference tensor keeps no version
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version
