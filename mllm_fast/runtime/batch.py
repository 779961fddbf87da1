"""Decoding of sequences that join and leave a batch between forward passes (continuous batching).

Each sequence follows a prefix, its own or a shared one. The unread tokens of all sequences are concatenated into one
row of input without padding. Each token attends to the prefix of its sequence (`prefix_pool`) and to the sequence's own
earlier tokens, which are kept here. The two results are joined by their log-sum-exps. So a sequence is computed as if
it were alone, whatever else is in the batch (Yu et al. 2022, "Orca").
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter

import torch
from torch import Tensor

from ..kernels import Attention, wide_type
from ..kernels.decoder_layers import KeyStore, Part
from ..models.text_model import TextModel, without_gradients
from .attention import Scoring, attend_split, join_rows
from .direct_decoder import DirectDecoder, direct_decoder
from .hooks import model_lock, recording
from .prefix_pool import Prefix, PrefixPool, SlotGroup

_ROOM = 32  # spare own positions that are allocated when a row runs out of them
_IDLE_BYTES = 1 << 28  # own keys and values up to this size are kept while there is no row

_without_gradients = without_gradients(attrgetter("text"))


@dataclass(eq=False)
class Row:
    """One sequence in progress.

    Attributes:
        prefix: The prefix that the sequence follows.
        position: Position of the first unread token, for the rotary embedding.
        unread: Tokens that the next forward pass reads, at least one.
        mass: The sum of the row's attention to its prefix, float32 [L, M], a mean over heads. None if it was not asked
            for.
        length: How many own tokens were read so far.
        slot: Index of the row in the batch.
    """

    prefix: Prefix
    position: int
    unread: list[int]
    mass: Tensor | None = None
    length: int = 0
    slot: int = field(default=-1, repr=False)


@dataclass(eq=False)
class _Part:
    """The tokens of a forward pass whose prefixes lie in one slot group.

    Attributes:
        stack: The slot group.
        token: Which tokens of the pass these are, int64 [n].
        place: Where each of them lies in a [S, width] array, int64 [n].
        width: The largest number of tokens that read one slot.
        start: The first key of each slot.
        watched: The rows whose attention mass is summed, by their number in the pass, one a slot.
    """

    stack: SlotGroup
    token: Tensor
    place: Tensor
    width: int
    start: Tensor
    watched: list[int]


class Batch:
    """The rows in progress. Only one thread may use it.

    Args:
        text: The text part of the model.
        backend: The backend of the kernels.
    """

    def __init__(self, text: TextModel, backend: str = "auto"):
        self.rows: list[Row] = []
        self.text = text
        self._backend = backend
        self._prefixes = PrefixPool()
        self._own: list[tuple[Tensor, Tensor]] = []  # a layer's own keys and values, [S, Hkv, room, D], newest first
        self._room = 0
        self._free: list[int] = []  # slots below the number of rows that no row has
        self._parts: list[_Part] = []
        self._last = self._slot = self._place = torch.empty(0, dtype=torch.long)
        self._starts = torch.empty(0, dtype=torch.int32)
        self._first: tuple[Tensor, Tensor, Tensor | None, int, int] | None = None
        self._single = False
        self._read: list[Row] = []  # the rows of the pass
        self._slots: Tensor | None = None  # their slots, unless they are all
        self._masses: list[tuple[Row, int, Tensor]] = []  # what the pass adds to their masses
        self._direct: DirectDecoder | None = None  # what runs the layers of the pass, unless the model itself does

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values of the prefixes and of the rows' own tokens."""
        return self._prefixes.nbytes + sum(tensor.nbytes for pair in self._own for tensor in pair)

    @_without_gradients
    def join(
        self,
        keys: Sequence[Tensor] | Tensor,
        values: Sequence[Tensor] | Tensor,
        position: int,
        ids: Sequence[int],
        name: Hashable | None = None,
        watch: bool = False,
    ) -> Row:
        """Add a row, which reads `ids` in the next forward pass.

        Args:
            keys, values: Keys and values of the prefix, [L][Hkv, M, D]; they are copied.
            position: Position of the first token of `ids`, for the rotary embedding.
            ids: The first tokens of the row, at least one.
            name: The name of a prefix that several rows share. The same name means the same prefix.
            watch: Sum the row's attention mass. This needs a prefix without a name, and a row that reads one token at a
                time.
        """
        if not ids:
            raise ValueError("a row reads at least one token")
        if watch and (name is not None or len(ids) > 1):
            raise ValueError("mass is summed of a prefix that is not shared, for a row that reads one token at a time")
        prefix = self._prefixes.acquire(list(keys), list(values), name, watch)
        mass = torch.zeros(len(keys), prefix.length, device=keys[0].device) if watch else None
        slot = self._free.pop() if self._free else len(self.rows)
        row = Row(prefix, position, list(ids), mass, slot=slot)
        self.rows.append(row)
        return row

    @_without_gradients
    def leave(self, row: Row) -> None:
        """Remove a row, whose slot the next one takes."""
        self.rows.remove(row)
        self._free.append(row.slot)
        row.slot = -1
        self._prefixes.release(row.prefix)
        if not self.rows and sum(held.nbytes for pair in self._own for held in pair) > _IDLE_BYTES:
            self._own, self._room, self._free = [], 0, []

    def forget(self, name: Hashable) -> None:
        """Free the slot of a shared prefix that will not be asked for again."""
        self._prefixes.forget(name)

    def prefix(self, row: Row) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return views of the keys and values of a row's prefix, [L][Hkv, M, D] each."""
        stack, slot = row.prefix.stack, row.prefix.slot
        first = stack.room - row.prefix.length
        return tuple(k[slot, :, first:] for k in stack.keys), tuple(v[slot, :, first:] for v in stack.values)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hold the model for this batch, and attach it where its layers are not run directly (`direct_decoder`).

        `read` works only inside the block.
        """
        with model_lock(self.text):
            self._direct = direct_decoder(self.text, self._backend)
            if self._direct is not None:
                yield
                return
            with recording(self.text, backend=self._backend, attention_fn=self._attend):
                yield

    @_without_gradients
    def read(self, rows: Sequence[Row] | None = None) -> Tensor:
        """Run one forward pass over the unread tokens of rows, and return the logits after the last token of each.

        Afterwards these rows have no unread tokens: give each its next ones before the next call. If the pass fails,
        the rows are as they were before.

        Args:
            rows: The rows that are read, some of `rows` in their order; all of them by default.

        Returns:
            The logits, [B, V], in the order of the rows.
        """
        if self._direct is None:
            self._close_gaps()
        self._read = self.rows if rows is None else list(rows)
        lengths = [len(row.unread) for row in self._read]
        device = self._device
        ends = [end - 1 for end in itertools.accumulate(lengths)]
        self._last = torch.tensor(ends, device=device)
        self._make_room(lengths)
        self._masses = []
        tokens = [token for row in self._read for token in row.unread]
        positions = [row.position + i for row, count in zip(self._read, lengths, strict=True) for i in range(count)]
        if self._direct is not None:
            hidden = self._read_directly(self._direct, tokens, positions, lengths, ends)
        else:
            self._plan(lengths, ends)
            hidden = self.text.decoder(
                input_ids=torch.tensor([tokens], device=device),
                # a ready mask keeps transformers from making one; `_attend` knows what each token sees
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
            ).last_hidden_state[0]
        logits = self.text.logits(hidden[self._last])
        for row, layer, mass in self._masses:
            row.mass[layer] += mass  # type: ignore[index]
        for row, count in zip(self._read, lengths, strict=True):
            row.position += count
            row.length += count
            row.unread = []
        return logits

    def _read_directly(
        self, direct: DirectDecoder, tokens: list[int], positions: list[int], lengths: list[int], ends: list[int]
    ) -> Tensor:
        """Run the layers of the decoder on the pass's tokens, and return what the final norm gives, [T, d]."""
        self._make_slots(direct)
        own: list[tuple[int, ...]] = []
        by_stack: dict[int, tuple[SlotGroup, list[tuple[int, ...]]]] = {}
        places, last = [], -1
        for row, count in zip(self._read, lengths, strict=True):
            stack = row.prefix.stack
            entries = by_stack.setdefault(id(stack), (stack, []))[1]
            for i in range(count):
                last += 1
                place = self._room - 1 - row.length - i  # own keys lie newest first
                places.append((row.slot, place))
                own.append((last, row.slot, place, self._room, place))
                entries.append((last, row.prefix.slot, stack.room - row.prefix.length, stack.room, 0))
        keys, values = [key for key, _ in self._own], [value for _, value in self._own]
        parts = [Part(keys, values, torch.tensor(own))]
        for stack, entries in by_stack.values():
            entries.sort(key=itemgetter(1))
            parts.append(Part(stack.keys, stack.values, torch.tensor(entries)))
        watched = [i for i, row in enumerate(self._read) if row.mass is not None]
        store = KeyStore(keys, values, torch.tensor(places))
        found = direct(direct.embed(tokens), positions, store, parts, [ends[i] for i in watched])
        for i, query in zip(watched, found.query if watched else (), strict=True):  # type: ignore[arg-type]
            self._add_mass(self._read[i], query, direct.scales)
        return found.normed

    def _make_slots(self, direct: DirectDecoder) -> None:
        """Allocate own keys and values for all rows, in all layers or in none."""
        count = len(self.rows) + len(self._free)
        held = len(self._own[0][0]) if self._own else 0
        if held >= count:
            return
        slots = max(4, count, 2 * held)
        made = []
        for layer in range(direct.num_layers):
            pair = [torch.zeros(slots, direct.kv_heads, self._room, direct.width) for _ in range(2)]
            if self._own:
                for new, old in zip(pair, self._own[layer], strict=True):
                    new[:held] = old
            made.append((pair[0], pair[1]))
        self._own = made

    def _add_mass(self, row: Row, query: Tensor, scales: Sequence[float]) -> None:
        """Add to a row's mass the attention of its token to its prefix, from the rotated queries [L, H, D]."""
        stack, slot, length = row.prefix.stack, row.prefix.slot, row.prefix.length
        own = slice(self._room - 1 - row.length, None)
        for layer, (one, scale) in enumerate(zip(query, scales, strict=True)):
            keys = torch.cat([stack.keys[layer][slot, :, -length:], self._own[layer][0][row.slot, :, own]], 1)
            scores = one.unflatten(0, (len(keys), -1)) @ keys.mT * scale
            self._masses.append((row, layer, torch.softmax(scores, -1)[..., :length].mean((0, 1))))

    @property
    def _device(self) -> torch.device:
        return self.rows[0].prefix.stack.keys[0].device

    def _make_room(self, lengths: list[int]) -> None:
        """Allocate the own positions that the pass needs, and check what it reads."""
        longest = max(row.length + count for row, count in zip(self._read, lengths, strict=True))
        if longest > self._room:
            self._grow(longest + max(_ROOM, self._room // 2))
        if any(count > 1 and row.length for row, count in zip(self._read, lengths, strict=True)):
            raise ValueError("a row reads one token at a time after its first ones")

    def _plan(self, lengths: list[int], ends: list[int]) -> None:
        """Compute where the T tokens of the pass lie, once for all layers."""
        device = self._device
        slots_read = [row.slot for row in self._read]
        self._slots = None if slots_read == list(range(len(self.rows))) else torch.tensor(slots_read, device=device)
        # own keys lie newest first, so that every row's are the last ones of its slot
        slots = [row.slot for row, count in zip(self._read, lengths, strict=True) for _ in range(count)]
        places = [
            self._room - 1 - row.length - i
            for row, count in zip(self._read, lengths, strict=True)
            for i in range(count)
        ]
        # `_first` computes the attention among own tokens of the rows that read several tokens
        several = [i for i, count in enumerate(lengths) if count > 1]
        starts = [
            self._room - row.length - 1 if count == 1 else self._room
            for row, count in zip(self._read, lengths, strict=True)
        ]
        self._slot, self._place = torch.tensor(slots, device=device), torch.tensor(places, device=device)
        self._starts = torch.tensor(starts, dtype=torch.int32, device=device)
        self._first = None
        self._single = len(several) < len(lengths)
        if several:
            width = max(lengths[i] for i in several)
            token = [ends[i] - lengths[i] + 1 + k for i in several for k in range(lengths[i])]
            place = [r * width + width - lengths[i] + k for r, i in enumerate(several) for k in range(lengths[i])]
            gaps = [width - lengths[i] for i in several]
            start = torch.tensor(gaps, dtype=torch.int32, device=device) if any(gaps) else None
            self._first = (
                torch.tensor(token, device=device),
                torch.tensor(place, device=device),
                start,
                len(several),
                width,
            )
        self._parts = self._by_stack(lengths, ends)

    def _close_gaps(self) -> None:
        """Move the last rows' own keys and values into free slots, so that those of a pass are views of the first."""
        count = len(self.rows)
        free = [slot for slot in self._free if slot < count]
        for row in self.rows:
            if row.slot >= count:
                slot = free.pop()
                own = slice(self._room - row.length, None)
                for held in (tensor for pair in self._own for tensor in pair if row.slot < len(tensor)):
                    held[slot, :, own] = held[row.slot, :, own]
                row.slot = slot
        self._free = []
        self.rows.sort(key=attrgetter("slot"))

    def _by_stack(self, lengths: list[int], ends: list[int]) -> list[_Part]:
        device = self._device
        stacks: dict[int, list[int]] = {}
        for i, row in enumerate(self._read):
            stacks.setdefault(id(row.prefix.stack), []).append(i)
        parts = []
        for members in stacks.values():
            stack = self._read[members[0]].prefix.stack
            token: list[int] = []
            where: list[tuple[int, int]] = []
            taken = [0] * len(stack.held)
            for i in members:
                slot = self._read[i].prefix.slot
                first = ends[i] - lengths[i] + 1
                token += range(first, first + lengths[i])
                where += [(slot, taken[slot] + k) for k in range(lengths[i])]
                taken[slot] += lengths[i]
            width = max(taken)
            parts.append(
                _Part(
                    stack=stack,
                    token=torch.tensor(token, device=device),
                    place=torch.tensor([slot * width + at for slot, at in where], device=device),
                    width=width,
                    start=stack.starts([slot for slot, count in enumerate(taken) if count], device),
                    watched=[i for i in members if self._read[i].mass is not None],
                )
            )
        return parts

    def _grow(self, room: int) -> None:
        def grown(held: Tensor) -> Tensor:
            wide = held.new_zeros(held.shape[0], held.shape[1], room, held.shape[3])
            wide[:, :, room - self._room :] = held
            return wide

        # all layers or none: memory may run out
        self._own, self._room = [(grown(keys), grown(values)) for keys, values in self._own], room

    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Return the attention of the pass's T tokens, [1, H, T, D], where key and value are [1, Hkv, T, D]."""
        own_key, own_value = self._keep(layer, key[0], value[0])
        rows = query[0].transpose(0, 1)  # [T, H, D]
        count = len(self._read)
        output, total = (
            rows.new_empty(*rows.shape[:2], value.shape[3]),
            rows.new_empty(rows.shape[:2], dtype=wide_type(rows.dtype)),
        )
        if self._single:
            # all slots in one call; rows that read several tokens see no key here, their start is behind the end
            alone = rows[self._last][:, :, None]
            slots = slice(count) if self._slots is None else self._slots
            found = attend_split(
                alone, own_key[slots], own_value[slots], self._starts, scoring, causal=False, backend=self._backend
            )
            output[self._last], total[self._last] = found.output[:, :, 0], found.lse[:, :, 0]  # type: ignore[index]
        if self._first is not None:
            token, place, start, several, width = self._first
            padded = [
                _padded(part, token, place, several, width)
                for part in (rows, *(x[0].transpose(0, 1) for x in (key, value)))
            ]
            found = attend_split(padded[0], padded[1], padded[2], start, scoring, causal=True, backend=self._backend)
            output[token] = found.output.transpose(1, 2).flatten(0, 1)[place]
            total[token] = found.lse.transpose(1, 2).flatten(0, 1)[place]  # type: ignore[union-attr]
        behind, weight = torch.empty_like(output), torch.empty_like(total)
        for part in self._parts:
            stack = part.stack
            padded_rows = _padded(rows, part.token, part.place, len(stack.held), part.width)
            # only causal calls return the mass; a single row at the last key sees all keys, so the result is the same
            watched = bool(part.watched)
            found = attend_split(
                padded_rows,
                stack.keys[layer],
                stack.values[layer],
                part.start,
                scoring._replace(sinks=None),  # a token's own keys take the sinks
                causal=watched,
                mass=watched,
                backend=self._backend,
            )
            behind[part.token] = found.output.transpose(1, 2).flatten(0, 1)[part.place]
            lse = found.lse.transpose(1, 2).flatten(0, 1)[part.place]  # type: ignore[union-attr]
            weight[part.token] = lse
            for i in part.watched:
                self._watch(layer, self._read[i], found, total[self._last[i]])
        prefix = Attention(behind.transpose(0, 1)[None], weight.transpose(0, 1)[None], None)
        return join_rows((output, total), prefix)

    def _watch(self, layer: int, row: Row, found: Attention, own: Tensor) -> None:
        """Add a row's attention to its prefix, scaled by the share of its attention that went to the prefix.

        `found` has the attention over the prefix alone; `own` is the log-sum-exp over the row's own tokens.
        """
        slot = row.prefix.slot
        share = torch.sigmoid(found.lse[slot, :, 0] - own)  # type: ignore[index]
        mass = found.mass[slot, :, -row.prefix.length :]  # type: ignore[index]
        self._masses.append((row, layer, (mass * share[:, None]).mean(0)))

    def _keep(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values [Hkv, T, D] of the pass, and return all of the layer, [S, Hkv, room, D] each."""
        count = len(self.rows)
        if layer == len(self._own):
            empty = [one.new_zeros(max(4, count), one.shape[0], self._room, one.shape[2]) for one in (key, value)]
            self._own.append((empty[0], empty[1]))
        elif len(self._own[layer][0]) < count:
            more = max(count, 2 * len(self._own[layer][0]))
            grown = [torch.cat([held, held.new_zeros(more - len(held), *held.shape[1:])]) for held in self._own[layer]]
            self._own[layer] = grown[0], grown[1]
        held = self._own[layer]
        for tensor, rows in zip(held, (key, value), strict=True):
            tensor[self._slot, :, self._place] = rows.transpose(0, 1)
        return held


def _padded(tokens: Tensor, which: Tensor, place: Tensor, count: int, width: int) -> Tensor:
    """Lay out tokens [T, H, D] as [count, H, width, D], with zeros in the places that no token takes."""
    wide = tokens.new_zeros(count * width, *tokens.shape[1:])
    wide[place] = tokens[which]
    return wide.unflatten(0, (count, width)).transpose(1, 2)
