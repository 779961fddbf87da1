"""Own keys and values of the rows of a batch, each row's in a slot of its own.

They lie newest first, so that every row's are the last ones of its slot, whatever their number. A slot whose row left
waits for the next row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

_ROOM = 32  # spare own positions that are allocated when a row runs out of them
_IDLE_BYTES = 1 << 28  # keys and values up to this size are kept while there is no row


class Slotted(Protocol):
    """A row: its slot, and how many own tokens were read so far."""

    slot: int
    length: int


class OwnKeys:
    """The keys and values of all rows, layer by layer.

    Attributes:
        room: How many positions a slot has.
        layers: Keys and values of each layer, [S, Hkv, room, D].
    """

    def __init__(self) -> None:
        self.room = 0
        self.layers: list[tuple[Tensor, Tensor]] = []
        self._free: list[int] = []  # slots below the number of those in use that no row has

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(tensor.nbytes for pair in self.layers for tensor in pair)

    def take_slot(self, rows: int) -> int:
        """Return a slot for a row that joins `rows` others."""
        return self._free.pop() if self._free else rows

    def leave_slot(self, slot: int, rows: int) -> None:
        """Give back a slot of a row that left `rows` others."""
        self._free.append(slot)
        if not rows and self.nbytes > _IDLE_BYTES:
            self.layers, self.room = [], 0
        if not rows:
            self._free = []

    def make_room(self, longest: int) -> None:
        """Allocate positions for a row of `longest` own tokens, in all layers or in none: memory may run out."""
        if longest <= self.room:
            return
        room = longest + max(_ROOM, self.room // 2)

        def grown(held: Tensor) -> Tensor:
            wide = held.new_zeros(held.shape[0], held.shape[1], room, held.shape[3])
            wide[:, :, room - self.room :] = held
            return wide

        self.layers, self.room = [(grown(keys), grown(values)) for keys, values in self.layers], room

    def make_slots(self, rows: int, num_layers: int, kv_heads: int, width: int, dtype: torch.dtype) -> None:
        """Allocate slots for `rows` rows in all layers, on the CPU."""
        count = rows + len(self._free)
        held = len(self.layers[0][0]) if self.layers else 0
        if held >= count:
            return
        slots, made = max(4, count, 2 * held), []
        for layer in range(num_layers):
            pair = [torch.zeros(slots, kv_heads, self.room, width, dtype=dtype) for _ in range(2)]
            for new, old in zip(pair, self.layers[layer] if self.layers else (), strict=False):
                new[:held] = old
            made.append((pair[0], pair[1]))
        self.layers = made

    def close_gaps(self, rows: Sequence[Slotted]) -> None:
        """Move rows into free slots, so that those in use are the first ones."""
        count = len(rows)
        free = [slot for slot in self._free if slot < count]
        for row in rows:
            if row.slot >= count:
                slot, own = free.pop(), slice(self.room - row.length, None)
                for held in (tensor for pair in self.layers for tensor in pair if row.slot < len(tensor)):
                    held[slot, :, own] = held[row.slot, :, own]
                row.slot = slot
        self._free = []

    def keep(
        self, layer: int, rows: int, slot: Tensor, place: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values [Hkv, T, D] of a pass of one layer, and return all of the layer."""
        if layer == len(self.layers):
            empty = [one.new_zeros(max(4, rows), one.shape[0], self.room, one.shape[2]) for one in (key, value)]
            self.layers.append((empty[0], empty[1]))
        elif len(self.layers[layer][0]) < rows:
            more = max(rows, 2 * len(self.layers[layer][0]))
            grown = [
                torch.cat([held, held.new_zeros(more - len(held), *held.shape[1:])]) for held in self.layers[layer]
            ]
            self.layers[layer] = grown[0], grown[1]
        held = self.layers[layer]
        for tensor, one in zip(held, (key, value), strict=True):
            tensor[slot, :, place] = one.transpose(0, 1)
        return held
