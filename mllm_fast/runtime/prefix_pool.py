"""A pool of prefixes that lie side by side, so that one kernel call a layer reads them all.

A slot group holds prefixes of similar length in slots, right-aligned. The first key of a slot is its `start`. The start
of a slot that nobody reads in a pass is behind the slot's end, where the kernel skips it. A prefix that several
sequences share is stored once. A shared prefix stays in its slot until another prefix needs the slot, so that the next
question about the same image finds it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_LEAST = 16  # lengths are rounded up to a multiple of this, or of a quarter of the power of two below if larger


@dataclass(eq=False)
class Prefix:
    """A prefix in its slot.

    Attributes:
        stack: The slot group.
        slot: Index of the slot in the group.
        length: How many tokens the prefix has.
        name: The name under which it is shared, or None.
        users: How many sequences use it.
        used: When it was last acquired, as a counter.
    """

    stack: SlotGroup
    slot: int
    length: int
    name: Hashable | None
    users: int = 0
    used: int = 0


@dataclass(eq=False)
class SlotGroup:
    """Slots for prefixes of similar length.

    Attributes:
        room: How many keys fit in a slot.
        keys, values: One [S, Hkv, room, D] a layer.
        held: The prefix in each slot, or None.
    """

    room: int
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    held: list[Prefix | None] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def put(self, slot: int, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Copy the keys and values of a prefix, [L][Hkv, M, D], into a slot."""
        first = self.room - keys[0].shape[1]
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            self.keys[layer][slot, :, first:] = key
            self.values[layer][slot, :, first:] = value

    def grow(self, count: int, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Enlarge the group to `count` slots, for keys and values like these, [Hkv, M, D] a layer."""
        before = len(self.held)
        for tensors, like in ((self.keys, keys), (self.values, values)):
            for layer, one in enumerate(like):
                wide = one.new_zeros(count, one.shape[0], self.room, one.shape[2])
                if before:
                    wide[:before] = tensors[layer]
                    tensors[layer] = wide
                else:
                    tensors.append(wide)
        self.held += [None] * (count - before)

    def starts(self, slots: Sequence[int], device: torch.device) -> Tensor:
        """Return the first key of each slot for a pass that reads the given slots, int32 [S].

        It is `room` for all other slots.
        """
        starts = [self.room] * len(self.held)
        for slot in slots:
            one = self.held[slot]
            starts[slot] = self.room - (0 if one is None else one.length)
        return torch.tensor(starts, dtype=torch.int32, device=device)


class PrefixPool:
    """A pool of slot groups, in which shared prefixes are found by name. Only one thread may use it."""

    def __init__(self) -> None:
        self._stacks: dict[tuple[tuple[bool, bool], int], SlotGroup] = {}
        self._named: dict[Hashable, Prefix] = {}
        self._clock = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, used and unused."""
        return sum(stack.nbytes for stack in self._stacks.values())

    def acquire(
        self, keys: Sequence[Tensor], values: Sequence[Tensor], name: Hashable | None = None, exclusive: bool = False
    ) -> Prefix:
        """Return a prefix in its slot; give it back with `release`.

        Args:
            keys, values: Keys and values of the prefix, [L][Hkv, M, D].
            name: The name of a shared prefix. The same name means the same prefix.
            exclusive: Put the prefix in a slot group that holds only exclusive ones.
        """
        self._clock += 1
        found = self._named.get(name) if name is not None else None
        if found is None:
            length = keys[0].shape[1]
            stack = self._stack((name is not None, exclusive), length)
            slot = self._slot(stack, keys, values)
            stack.put(slot, keys, values)
            found = Prefix(stack, slot, length, name)
            stack.held[slot] = found
            if name is not None:
                self._named[name] = found
        found.users += 1
        found.used = self._clock
        return found

    def release(self, prefix: Prefix) -> None:
        """Give back a prefix on behalf of one sequence."""
        prefix.users -= 1
        stack = prefix.stack
        if prefix.users or prefix.name is not None:
            return
        stack.held[prefix.slot] = None
        if not any(stack.held):  # drop the empty group: its unnamed prefixes will not be asked for again
            self._stacks = {key: one for key, one in self._stacks.items() if one is not stack}

    def forget(self, name: Hashable) -> None:
        """Drop a name that will not be asked for again; sequences that use the prefix keep it."""
        found = self._named.pop(name, None)
        if found is not None:
            found.name = None
            found.users += 1
            self.release(found)

    def _stack(self, kind: tuple[bool, bool], length: int) -> SlotGroup:
        step = max(_LEAST, (1 << (length.bit_length() - 1)) // 4)
        room = -(-length // step) * step
        key = kind, room
        if key not in self._stacks:
            for other, stack in list(self._stacks.items()):  # free idle groups to make room for the new one
                if not any(one is not None and one.users for one in stack.held):
                    for one in stack.held:
                        if one is not None:
                            self._named.pop(one.name, None)
                    del self._stacks[other]
            self._stacks[key] = SlotGroup(room)
        return self._stacks[key]

    def _slot(self, stack: SlotGroup, keys: Sequence[Tensor], values: Sequence[Tensor]) -> int:
        if None in stack.held:
            return stack.held.index(None)
        idle = [one for one in stack.held if one is not None and not one.users]
        if idle:
            oldest = min(idle, key=lambda one: one.used)
            self._named.pop(oldest.name, None)
            return oldest.slot
        count = len(stack.held)
        stack.grow(max(4, 2 * count), keys, values)
        return count
