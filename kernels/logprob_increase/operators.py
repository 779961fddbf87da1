"""The operators M = W_U diag(g) O of the factored way, and a cache of them within a byte budget."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from threading import Lock

from torch import Tensor

from ..dispatch import wide_type
from .unembedding import Unembedding


def make_operator(unembedding: Unembedding, projection: Tensor, centred: bool) -> Tensor:
    """M [V, k] = W_U diag(g) O for a projection O [d, k], with O's columns centred if `centred` (a layer
    norm with its own statistics takes the mean off). In the unembedding's dtype; computed in float32 or
    wider."""
    wide = wide_type(unembedding.weight.dtype)
    columns = projection.to(wide)
    if centred:
        columns = columns - columns.mean(0)
    return unembedding.times(columns).to(unembedding.weight.dtype).contiguous()


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
        self._lock = Lock()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    @staticmethod
    def full_keys(keys: Sequence[Hashable], unembedding: Unembedding, centred: bool) -> list[Hashable]:
        """The keys, each with what else the operators are made of."""
        weights = [w for w in (unembedding.weight, unembedding.gain) if w is not None]
        state = (centred, *map(weight_state, weights))
        return [(key, state) for key in keys]

    def find(self, full: Sequence[Hashable]) -> list[Tensor | None]:
        """The operators of full keys, None where one is not in the cache."""
        found: list[Tensor | None] = []
        with self._lock:
            for key in full:
                operator = self._entries.get(key)
                if operator is not None:
                    self._entries.move_to_end(key)
                found.append(operator)
        return found

    def get(self, full: Hashable, unembedding: Unembedding, projection: Tensor, centred: bool) -> Tensor:
        """The operator of a full key, from the cache or made now; kept if it fits the budget at all."""
        (operator,) = self.find([full])
        if operator is not None:
            return operator
        operator = make_operator(unembedding, projection, centred)
        with self._lock:
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
            self.nbytes = 0


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
        self.cache = cache
        self.full = [] if cache is None or keys is None else cache.full_keys(keys, unembedding, centred)
        # those of the cache, until they are asked for: others that are made meanwhile may push them out of it
        self._found: list[Tensor | None] = [None] * len(projection) if cache is None else cache.find(self.full)
        weight = unembedding.weight
        self.dtype = weight.dtype
        self.nbytes = weight.shape[0] * projection[0].shape[1] * weight.element_size() if len(projection) else 0

    def __len__(self) -> int:
        return len(self.projection)

    def __getitem__(self, group: int) -> Tensor:
        found, self._found[group] = self._found[group], None
        if found is not None:
            return found
        if self.cache is None:
            return make_operator(self.unembedding, self.projection[group], self.centred)
        return self.cache.get(self.full[group], self.unembedding, self.projection[group], self.centred)

    @property
    def to_make(self) -> int:
        """How many are not at hand."""
        return sum(one is None for one in self._found)

    def at_hand(self, group: int) -> bool:
        """Whether an operator need not be made."""
        return self._found[group] is not None


def held_together(operators: Operators, most_made: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Runs of groups, and their operators: of those that must be made at most `most_made` bytes at a time."""
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
