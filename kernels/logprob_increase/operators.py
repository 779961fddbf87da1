"""The operators M = W_U diag(g) O of the factored way, and a cache of operators with a budget in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from threading import Lock

import torch
from torch import Tensor

from ..dispatch import wide_type
from .unembedding import Unembedding


def make_operator(unembedding: Unembedding, projection: Tensor, centred: bool) -> Tensor:
    """Compute the operator M = W_U diag(g) O of a projection O.

    Args:
        unembedding: Final norm and unembedding, W_U and g.
        projection: O, [d, k].
        centred: Whether to centre the columns of O, because a layer norm with its own statistics subtracts the mean.

    Returns:
        M, [V, k], in the dtype of the unembedding, computed in float32 or wider and stored by `with_longest`.
    """
    wide = wide_type(unembedding.weight.dtype)
    columns = projection.to(wide)
    if centred:
        columns = columns - columns.mean(0)
    return with_longest(unembedding.times(columns), unembedding.weight.dtype)


def with_longest(operator: Tensor, dtype: torch.dtype) -> Tensor:
    """Store an operator in `dtype`, with the length of its longest row behind it where `triton_moments` reads it.

    The length is stored if `dtype` has two bytes, so that tensor cores read it, and the number of elements is even, so
    that a float32 fits behind them.

    Args:
        operator: [V, k].
        dtype: Dtype of the result.

    Returns:
        The operator, [V, k], contiguous, in `dtype`. The length, a float32, follows its last element in memory.
    """
    if dtype.itemsize != 2 or operator.numel() % 2:
        return operator.to(dtype).contiguous()
    room = torch.empty(operator.numel() + 2, dtype=dtype, device=operator.device)
    stored = room[:-2].view(operator.shape)
    stored.copy_(operator)
    room[-2:].view(torch.float32).copy_(torch.linalg.vector_norm(stored, dim=1, dtype=torch.float32).max())
    return stored


class Together(list[Tensor]):
    """The operators of one call, when all of them are at hand.

    The next call for the same operators finds this list again, with its table.

    Attributes:
        table: The addresses of the operators on the device, or None until a kernel has put them there.
    """

    table: Tensor | None = None


class OperatorCache:
    """A cache of operators by key, which drops the least recently used ones first.

    A key names a projection and the state of its weights (`weight_state`), so that an operator made before a training
    step is not used after it. The cache adds the state of the unembedding to the key.

    Args:
        budget: Largest size of all operators together, in bytes.

    Attributes:
        budget: Largest size of all operators together, in bytes.
        nbytes: Current size of all operators together, in bytes.

    Raises:
        ValueError: `budget` is negative.
    """

    def __init__(self, budget: int):
        if budget < 0:
            raise ValueError(f"budget is a number of bytes >= 0, got {budget}")
        self.budget = budget
        self.nbytes = 0
        self._entries: OrderedDict[Hashable, Tensor] = OrderedDict()
        # keys and operators of the last call that found all: a thousand lookups take longer than scoring some of them
        self._last: tuple[Sequence[Hashable], Together] | None = None
        self._lock = Lock()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    @staticmethod
    def state(unembedding: Unembedding, centred: bool) -> Hashable:
        """Return the part of a key that the cache adds: `centred` and the state of the unembedding's weights."""
        weights = [w for w in (unembedding.weight, unembedding.gain) if w is not None]
        return (centred, *map(weight_state, weights))

    def find(self, keys: Sequence[Hashable], state: Hashable) -> list[Tensor | None] | Together:
        """Return the operators of keys in a list, with None for each one that is not in the cache.

        Args:
            keys: Keys of the operators.
            state: State of the unembedding; see `state`.

        Returns:
            A `Together` if all operators are in the cache, else a plain list.
        """
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
        """Return the operator of a key and state, from the cache if it is there.

        Otherwise the operator is computed, and stored if it alone fits the budget.

        Args:
            full: The key and the state of the unembedding; see `state`.
            unembedding, projection, centred: As in `make_operator`.

        Returns:
            The operator, [V, k].
        """
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
    """The operators of all groups, each taken from the cache or computed when it is indexed.

    Args:
        unembedding: Final norm and unembedding.
        projection: Projection O of each group, [G, d, k] or G tensors [d, k].
        centred: Whether to centre the columns of the projections; see `make_operator`.
        cache, keys: A cache and the keys of the G operators in it, or None for both.

    Attributes:
        dtype: Dtype of an operator.
        nbytes: Size of one operator in bytes.
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
        # operators from the cache, held until they are indexed: those that are made meanwhile may evict them
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
        """All operators if none of them has to be made, else None."""
        return self._found if isinstance(self._found, Together) else None

    @property
    def to_make(self) -> int:
        """The number of operators that are not at hand."""
        return 0 if self.together is not None else sum(one is None for one in self._found)

    def at_hand(self, group: int) -> bool:
        """Return whether the operator of a group is at hand and does not have to be made."""
        return self._found[group] is not None


def held_together(operators: Operators, most_made: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Iterate over runs of consecutive groups with their operators.

    Args:
        operators: Operators of all groups.
        most_made: Largest size in bytes of the operators that are made for one run. A run of one operator may exceed
            it.

    Yields:
        The slice of the groups of a run, and the list of their operators.
    """
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
    """Return a value that tells a weight, and its value after an in-place change, from any other."""
    # an inference tensor has no version counter
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version
