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
from .own_keys import OwnKeys
from .prefix_pool import Prefix, PrefixPool, SlotGroup

_without_gradients = without_gradients(attrgetter("text"))


@dataclass(eq=False)
class Row:
    """One sequence in progress.

    Attributes:
        prefix: The prefix that the sequence follows.
        position: Position of the first unread token, for the rotary embedding.
        unread: Tokens that the next forward pass reads, at least one.
        mass: The sum of the row's attention to its prefix, float32 [L, M], a mean over the heads of this process. None
            if it was not asked for.
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


@dataclass(eq=False)
class _Pass:
    """Where the T tokens of a forward pass lie, for the layers on one device.

    Attributes:
        last: The last token of each row that is read.
        slots: The slots of these rows, or None if they are all.
        slot, place: The slot of each token, and its place in it.
        starts: The first own key of each row; behind the end for a row that reads several tokens.
        first: Of the rows that read several tokens: which tokens these are, where they lie in a [rows, width] array,
            where each begins, how many rows there are, and the width. None if there is none.
        single: Whether some rows read one token.
        parts: The tokens by the slot group of their prefixes.
    """

    last: Tensor
    slots: Tensor | None
    slot: Tensor
    place: Tensor
    starts: Tensor
    first: tuple[Tensor, Tensor, Tensor | None, int, int] | None
    single: bool
    parts: list[_Part]


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
        self._own = OwnKeys()
        self._read: list[Row] = []  # the rows of the pass
        self._lengths: list[int] = []  # how many tokens each of them reads
        self._ends: list[int] = []  # and which is its last
        self._passes: dict[torch.device, _Pass] = {}  # the pass, by the device of the layers
        self._masses: list[tuple[Row, int, Tensor]] = []  # what the pass adds to their masses
        self._direct: DirectDecoder | None = None  # what runs the layers of the pass, unless the model itself does

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values of the prefixes and of the rows' own tokens."""
        return self._prefixes.nbytes + self._own.nbytes

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
        row = Row(prefix, position, list(ids), mass, slot=self._own.take_slot(len(self.rows)))
        self.rows.append(row)
        return row

    @_without_gradients
    def leave(self, row: Row) -> None:
        """Remove a row, whose slot the next one takes."""
        self.rows.remove(row)
        self._own.leave_slot(row.slot, len(self.rows))
        row.slot = -1
        self._prefixes.release(row.prefix)

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
            self._own.close_gaps(self.rows)
        self._read = self.rows if rows is None else list(rows)
        lengths = [len(row.unread) for row in self._read]
        device = self._device
        ends = [end - 1 for end in itertools.accumulate(lengths)]
        if any(count > 1 and row.length for row, count in zip(self._read, lengths, strict=True)):
            raise ValueError("a row reads one token at a time after its first ones")
        self._own.make_room(max(row.length + count for row, count in zip(self._read, lengths, strict=True)))
        self._masses = []
        tokens = [token for row in self._read for token in row.unread]
        positions = [row.position + i for row, count in zip(self._read, lengths, strict=True) for i in range(count)]
        if self._direct is not None:
            logits = self._direct.logits(self._read_directly(self._direct, tokens, positions, lengths, ends))
        else:
            self._lengths, self._ends, self._passes = lengths, ends, {}
            hidden = self.text.decoder(
                input_ids=torch.tensor([tokens], device=device),
                # a ready mask keeps transformers from making one; `_attend` knows what each token sees
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
            ).last_hidden_state[0]
            logits = self.text.logits(hidden[torch.tensor(ends, device=hidden.device)])
        for row, layer, mass in self._masses:
            row.mass[layer] += mass.to(row.mass.device)  # type: ignore[index, operator, union-attr]
        for row, count in zip(self._read, lengths, strict=True):
            row.position += count
            row.length += count
            row.unread = []
        return logits

    def _read_directly(
        self, direct: DirectDecoder, tokens: list[int], positions: list[int], lengths: list[int], ends: list[int]
    ) -> Tensor:
        """Run the layers on the pass's tokens, and return what the final norm gives of each row's last one, [B, d]."""
        self._own.make_slots(len(self.rows), direct.num_layers, direct.kv_heads, direct.width, direct.dtype)
        own: list[tuple[int, ...]] = []
        by_stack: dict[int, tuple[SlotGroup, list[tuple[int, ...]]]] = {}
        places, last = [], -1
        for row, count in zip(self._read, lengths, strict=True):
            stack = row.prefix.stack
            entries = by_stack.setdefault(id(stack), (stack, []))[1]
            for i in range(count):
                last += 1
                place = self._own.room - 1 - row.length - i  # own keys lie newest first
                places.append((row.slot, place))
                own.append((last, row.slot, place, self._own.room, place))
                entries.append((last, row.prefix.slot, stack.room - row.prefix.length, stack.room, 0))
        keys, values = ([pair[i] for pair in self._own.layers] for i in (0, 1))
        parts = [Part(keys, values, torch.tensor(own))]
        for stack, entries in by_stack.values():
            entries.sort(key=itemgetter(1))
            parts.append(Part(stack.keys, stack.values, torch.tensor(entries)))
        watched = [i for i, row in enumerate(self._read) if row.mass is not None]
        store = KeyStore(keys, values, torch.tensor(places))
        found = direct(direct.embed(tokens), positions, store, parts, [ends[i] for i in watched], ends)
        for i, query in zip(watched, found.query if watched else (), strict=True):  # type: ignore[arg-type]
            masses = _mass_of(self._read[i], query, self._own, direct.scales)
            self._masses += [(self._read[i], layer, mass) for layer, mass in enumerate(masses)]
        return found.normed

    @property
    def _device(self) -> torch.device:
        return self.rows[0].prefix.stack.keys[0].device

    def _pass(self, device: torch.device) -> _Pass:
        """Return where the tokens of the pass lie, computed once for all layers on a device."""
        if device not in self._passes:
            self._passes[device] = self._placed(device)
        return self._passes[device]

    def _placed(self, device: torch.device) -> _Pass:
        lengths, ends = self._lengths, self._ends
        read = [row.slot for row in self._read]
        # own keys lie newest first, so that every row's are the last ones of its slot
        slots = [slot for slot, count in zip(read, lengths, strict=True) for _ in range(count)]
        places = [
            self._own.room - 1 - row.length - i
            for row, count in zip(self._read, lengths, strict=True)
            for i in range(count)
        ]
        # `first` has the attention among own tokens of the rows that read several tokens
        several = [i for i, count in enumerate(lengths) if count > 1]
        starts = [
            self._own.room - row.length - 1 if count == 1 else self._own.room
            for row, count in zip(self._read, lengths, strict=True)
        ]
        first = None
        if several:
            width = max(lengths[i] for i in several)
            token = [ends[i] - lengths[i] + 1 + k for i in several for k in range(lengths[i])]
            place = [r * width + width - lengths[i] + k for r, i in enumerate(several) for k in range(lengths[i])]
            gaps = [width - lengths[i] for i in several]
            start = torch.tensor(gaps, dtype=torch.int32, device=device) if any(gaps) else None
            both = torch.tensor(token, device=device), torch.tensor(place, device=device)
            first = (*both, start, len(several), width)
        return _Pass(
            last=torch.tensor(ends, device=device),
            slots=None if read == list(range(len(self.rows))) else torch.tensor(read, device=device),
            slot=torch.tensor(slots, device=device),
            place=torch.tensor(places, device=device),
            starts=torch.tensor(starts, dtype=torch.int32, device=device),
            first=first,
            single=len(several) < len(lengths),
            parts=self._by_stack(device),
        )

    def _by_stack(self, device: torch.device) -> list[_Part]:
        lengths, ends = self._lengths, self._ends
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

    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Return the attention of the pass's T tokens, [1, H, T, D], where key and value are [1, Hkv, T, D]."""
        here = self._pass(query.device)
        own_key, own_value = self._own.keep(layer, len(self.rows), here.slot, here.place, key[0], value[0])
        rows = query[0].transpose(0, 1)  # [T, H, D]
        count = len(self._read)
        output, total = (
            rows.new_empty(*rows.shape[:2], value.shape[3]),
            rows.new_empty(rows.shape[:2], dtype=wide_type(rows.dtype)),
        )
        if here.single:
            # all slots in one call; rows that read several tokens see no key here, their start is behind the end
            alone = rows[here.last][:, :, None]
            slots = slice(count) if here.slots is None else here.slots
            found = attend_split(
                alone, own_key[slots], own_value[slots], here.starts, scoring, causal=False, backend=self._backend
            )
            output[here.last], total[here.last] = found.output[:, :, 0], found.lse[:, :, 0]  # type: ignore[index]
        if here.first is not None:
            token, place, start, several, width = here.first
            padded = [
                _padded(part, token, place, several, width)
                for part in (rows, *(x[0].transpose(0, 1) for x in (key, value)))
            ]
            found = attend_split(padded[0], padded[1], padded[2], start, scoring, causal=True, backend=self._backend)
            output[token] = found.output.transpose(1, 2).flatten(0, 1)[place]
            total[token] = found.lse.transpose(1, 2).flatten(0, 1)[place]  # type: ignore[union-attr]
        behind, weight = torch.empty_like(output), torch.empty_like(total)
        for part in here.parts:
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
                self._watch(layer, self._read[i], found, total[self._ends[i]])
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


def _mass_of(row: Row, query: Tensor, own: OwnKeys, scales: Sequence[float]) -> list[Tensor]:
    """Return the attention of a row's token to its prefix in each layer, [M], from the rotated queries [L, H, D]."""
    stack, slot, length = row.prefix.stack, row.prefix.slot, row.prefix.length
    read, found = slice(own.room - 1 - row.length, None), []
    for layer, (one, scale) in enumerate(zip(query, scales, strict=True)):
        keys = torch.cat([stack.keys[layer][slot, :, -length:], own.layers[layer][0][row.slot, :, read]], 1)
        scores = one.unflatten(0, (len(keys), -1)) @ keys.mT * scale
        found.append(torch.softmax(scores, -1)[..., :length].mean((0, 1)))
    return found


def _padded(tokens: Tensor, which: Tensor, place: Tensor, count: int, width: int) -> Tensor:
    """Lay out tokens [T, H, D] as [count, H, width, D], with zeros in the places that no token takes."""
    wide = tokens.new_zeros(count * width, *tokens.shape[1:])
    wide[place] = tokens[which]
    return wide.unflatten(0, (count, width)).transpose(1, 2)
