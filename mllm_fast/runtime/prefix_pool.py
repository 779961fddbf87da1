"""PrefixPool of different sequences side by side, so that one kernel call a layer reads them all.

A stack holds prefixes of about one length in slots, right-aligned: a slot's first key is its `start`, and a slot that
nobody reads in a pass starts behind its end, where the kernel skips it. A prefix that several sequences share lies
there once. What was read stays in its slot until another needs it, so that the next question about an image finds it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_LEAST = 16  # lengths are rounded up to a multiple of this, and of a quarter of the power of two below them


@dataclass(eq=False)
class Prefix:
    """A prefix in its slot. `users`: sequences that hold it. `used`: when it was last taken, a counter."""

    stack: SlotGroup
    slot: int
    length: int
    name: Hashable | None
    users: int = 0
    used: int = 0


@dataclass(eq=False)
class SlotGroup:
    """keys, values: one [S, Hkv, room, D] a layer. `start`: first key of each slot, int32 [S]; `room` of an empty
    one. `held`: what lies in each slot."""

    room: int
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    held: list[Prefix | None] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def put(self, slot: int, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Lay a prefix [L][Hkv, M, D] into a slot."""
        first = self.room - keys[0].shape[1]
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            self.keys[layer][slot, :, first:] = key
            self.values[layer][slot, :, first:] = value

    def grow(self, count: int, like: Sequence[Tensor]) -> None:
        """Make it `count` slots."""
        before = len(self.held)
        for tensors in (self.keys, self.values):
            for layer, one in enumerate(like):
                wide = one.new_zeros(count, one.shape[0], self.room, one.shape[2])
                if before:
                    wide[:before] = tensors[layer]
                    tensors[layer] = wide
                else:
                    tensors.append(wide)
        self.held += [None] * (count - before)

    def starts(self, slots: Sequence[int], device: torch.device) -> Tensor:
        """`start` of a pass in which these slots are read, int32 [S]."""
        starts = [self.room] * len(self.held)
        for slot in slots:
            one = self.held[slot]
            starts[slot] = self.room - (0 if one is None else one.length)
        return torch.tensor(starts, dtype=torch.int32, device=device)


class PrefixPool:
    """Stacks of prefixes, shared ones found by name. Not for several threads at once."""

    def __init__(self) -> None:
        self._stacks: dict[tuple[tuple[bool, bool], int], SlotGroup] = {}
        self._named: dict[Hashable, Prefix] = {}
        self._clock = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, of those in use and of the others."""
        return sum(stack.nbytes for stack in self._stacks.values())

    def acquire(
        self, keys: Sequence[Tensor], values: Sequence[Tensor], name: Hashable | None = None, exclusive: bool = False
    ) -> Prefix:
        """A prefix [L][Hkv, M, D] in its slot; what has the same name is taken to be the same. Give it back. `apart`:
        in a stack of such alone."""
        self._clock += 1
        found = self._named.get(name) if name is not None else None
        if found is None:
            length = keys[0].shape[1]
            stack = self._stack((name is not None, exclusive), length)
            slot = self._slot(stack, keys)
            stack.put(slot, keys, values)
            found = Prefix(stack, slot, length, name)
            stack.held[slot] = found
            if name is not None:
                self._named[name] = found
        found.users += 1
        found.used = self._clock
        return found

    def release(self, prefix: Prefix) -> None:
        """One sequence fewer needs it."""
        prefix.users -= 1
        stack = prefix.stack
        if prefix.users or prefix.name is not None:
            return
        stack.held[prefix.slot] = None
        if not any(stack.held):  # nobody will find these again
            self._stacks = {key: one for key, one in self._stacks.items() if one is not stack}

    def forget(self, name: Hashable) -> None:
        """A name that will not be asked for again; who reads it goes on."""
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
            for other, stack in list(self._stacks.items()):  # room for the new one
                if not any(one is not None and one.users for one in stack.held):
                    for one in stack.held:
                        if one is not None:
                            self._named.pop(one.name, None)
                    del self._stacks[other]
            self._stacks[key] = SlotGroup(room)
        return self._stacks[key]

    def _slot(self, stack: SlotGroup, keys: Sequence[Tensor]) -> int:
        if None in stack.held:
            return stack.held.index(None)
        idle = [one for one in stack.held if one is not None and not one.users]
        if idle:
            oldest = min(idle, key=lambda one: one.used)
            self._named.pop(oldest.name, None)
            return oldest.slot
        count = len(stack.held)
        stack.grow(max(4, 2 * count), keys)
        return count
