"""Decoding of many questions over one shared prefix, in joint forward passes.

The tokens of all questions are concatenated into one row of input without padding. Each token attends to the prefix,
whose keys and values are read in place, and to the keys of its own question, which are kept here. The two results are
joined by their log-sum-exps. So a question is computed as if it were asked alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.decoder_layers import KeyStore, Part
from ..models.text_model import TextModel
from .attention import Scoring, attend_seen, attend_split, join_rows
from .direct_decoder import DirectDecoder, direct_decoder
from .hooks import model_lock, recording
from .record import Recording
from .trace import Trace, trace_of

_ROOM = 32  # the most positions that are allocated ahead


class SharedPrefixDecoder:
    """B questions in progress, over the keys and values of a prefix.

    Args:
        text: The text part of the model.
        keys, values: Keys and values of the prefix, [L, Hkv, M, D] or a sequence of L tensors; they are only read.
        position: Position of the first token after the prefix, for the rotary embedding. It is more than M if tokens
            were dropped.
        count: The number of questions B.
        backend: The backend of the kernels.
        expected: How many tokens are likely to be read after the first ones. Space for them is allocated at once.
        places: Where the prefix's tokens lie in the sequence before tokens were dropped, int64 [S, M], and the length
            of that sequence. It is needed for layers with a sliding window.
    """

    def __init__(
        self,
        text: TextModel,
        keys: Sequence[Tensor] | Tensor,
        values: Sequence[Tensor] | Tensor,
        position: int,
        count: int,
        backend: str = "auto",
        expected: int = _ROOM,
        places: tuple[Tensor, int] | None = None,
    ):
        self.text = text
        self.backend = backend
        self.keys, self.values = keys, values
        self._device = keys[0].device  # of the first layer; others may lie elsewhere
        self.length = 0  # own positions of the longest question; shorter questions begin later
        self._next = torch.full((count,), position)
        self._start: Tensor | None = None
        self._own: list[tuple[Tensor, Tensor]] = []  # a site's own keys and values, [B, room, Hkv, D]
        self._rows = torch.empty(0, dtype=torch.long)  # where the tokens of the current pass lie in [B, longest]
        self._moved: dict[torch.device, tuple[Tensor, Tensor | None]] = {}  # `_rows` and `_start` on other devices
        self._longest = 0
        self._room = min(expected, _ROOM)
        self._places = places
        self._direct: DirectDecoder | None = None  # what runs the layers, unless the model itself does
        self._record: Recording | None = None

    @contextmanager
    def recording(self, rows: int = 0) -> Iterator[Recording]:
        """Hold the model for this session, and record the last `rows` rows of each pass.

        The model is attached where its layers are not run directly (`direct_decoder`). `read` works only inside the
        block.
        """
        with model_lock(self.text):
            held = self.keys[0], self.values[0]
            plain = all(one.device.type == "cpu" for one in held)
            found = direct_decoder(self.text, self.backend) if plain else None
            fits = found is not None and found.window is None and all(one.dtype == found.dtype for one in held)
            self._direct = found if fits else None
            if self._direct is None:
                with recording(self.text, rows, backend=self.backend, attention_fn=self.attend) as self._record:
                    yield self._record
                return
            self._record = Recording(rows, len(self.text.layers), len(self.text.sites), self._device)
            yield self._record

    def read(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Add tokens to every question, and return the logits after the last token of each, [B, V].

        After the first call, every question takes the same number of tokens.
        """
        lengths = torch.tensor([len(one) for one in ids])
        self._longest = int(lengths.max())
        gap = self._longest - lengths
        if self.length == 0:
            self._start = gap.int().to(self._device) if bool(gap.any()) else None
        elif bool(gap.any()):
            raise ValueError(f"after the first tokens each question takes as many, got {lengths.tolist()}")
        self.length += self._longest
        within = torch.cat([torch.arange(n) for n in lengths])
        question = torch.arange(len(ids)).repeat_interleave(lengths)
        self._rows = (question * self._longest + gap[question] + within).to(self._device)
        self._moved = {}
        positions = (self._next[question] + within).to(self._device)
        self._next = self._next + lengths
        tokens = torch.tensor([[token for one in ids for token in one]], device=self._device)
        last = lengths.cumsum(0) - 1
        if self._direct is not None:
            found = self._read_directly(self._direct, tokens[0], positions, question, last.tolist())
            return self._direct.logits(found)
        hidden = self._decode(tokens, positions[None])[0]
        return self.text.logits(hidden[last.to(hidden.device)])

    def _read_directly(
        self, direct: DirectDecoder, tokens: Tensor, positions: Tensor, question: Tensor, ends: list[int]
    ) -> Tensor:
        """Run the layers on T tokens of these questions, and return what the final norm gives of each last one."""
        assert self._record is not None
        rows, count = torch.arange(len(tokens)), len(self._next)
        if not self._own or self._own[0][0].shape[1] < self.length:
            empty = torch.empty(0, direct.kv_heads, direct.width, dtype=direct.dtype)
            for layer in range(direct.num_layers):
                self._make_room(layer, [empty, empty])
        place = self.length - self._longest + self._rows % self._longest
        start = torch.zeros(count, dtype=torch.long) if self._start is None else self._start.long()
        own_keys, own_values = ([pair[i].transpose(1, 2) for pair in self._own] for i in (0, 1))
        own = torch.stack([rows, question, start[question], place + 1, place], 1)
        zeros, last = torch.zeros_like(rows), torch.full_like(rows, self.keys[0].shape[1])
        behind = torch.stack([rows, zeros, zeros, last, zeros], 1)
        keys, values = ([one[None] for one in many] for many in (self.keys, self.values))
        parts = [Part(own_keys, own_values, own), Part(keys, values, behind)]
        store = KeyStore(own_keys, own_values, torch.stack([question, place], 1))
        recorded = range(len(tokens))[len(tokens) - self._record.rows :] if self._record.rows else ()
        needed = sorted({*ends, *recorded})
        found = direct(direct.embed(tokens), positions.tolist(), store, parts, recorded, needed)
        if recorded:
            self._record.add(found, [needed.index(row) for row in recorded], direct.scales)
        return found.normed[[needed.index(row) for row in ends]]

    def _decode(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Run the decoder on tokens [1, T] at positions [1, T], and return what the final norm gives, [1, T, d]."""
        return self.text.decoder(
            input_ids=tokens,
            # a ready mask keeps transformers from making one; `attend` knows what each row sees
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self._device),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state

    def attend(self, site: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Return the attention of the pass's T tokens at one site.

        Args:
            site: The number of the site.
            query: Queries of the tokens, [1, H, T, D].
            key, value: Their own keys and values, [1, Hkv, T, D].
            scoring: How scores become weights.

        Returns:
            [1, H, T, D].
        """
        count, longest = len(self._next), self._longest
        where, start = self._on(query.device)
        own_key, own_value = self._add(site, [one[0].transpose(0, 1) for one in (key, value)])
        rows = query[0].transpose(0, 1)  # [T, H, D]
        padded = rows
        if self._start is not None and longest > 1:
            padded = rows.new_zeros(count * longest, *rows.shape[1:])
            padded[where] = rows
        padded = padded.reshape(count, longest, *rows.shape[1:]).transpose(1, 2)
        window = self.text.sites[site].window
        if self.keys[site].dtype != query.dtype:  # autocast, or no autocast where the prefix was read with it
            self.keys, self.values = ([one.to(query.dtype) for one in many] for many in (self.keys, self.values))
        keys, values = self.keys[site][None], self.values[site][None]
        behind = scoring._replace(sinks=None)  # the own keys' part takes the sinks
        if window is not None and self._places is not None and self._places[1] + self.length > window:
            own_seen, prefix_seen = (one.to(query.device) for one in self._within(site, window))
            own = attend_seen(padded, own_key, own_value, own_seen, scoring)
            shared = attend_seen(query, keys, values, prefix_seen, behind)
        else:
            own = attend_split(padded, own_key, own_value, start, scoring, causal=True, backend=self.backend)
            shared = attend_split(query, keys, values, None, behind, causal=False, backend=self.backend)
        output, total = own.output.transpose(1, 2).flatten(0, 1), own.lse.transpose(1, 2).flatten(0, 1)  # type: ignore[union-attr]
        if self._start is not None and longest > 1:
            output, total = output[where], total[where]
        return join_rows((output, total), shared)

    def _within(self, site: int, window: int) -> tuple[Tensor, Tensor]:
        """Return which own keys, bool [B, 1, longest, length], and prefix keys, [1, 1, T, M], lie in a window."""
        places, before = self._places  # type: ignore[misc]
        slots, device = torch.arange(self.length, device=self._device), self._device
        row = slots[self.length - self._longest :, None]
        seen = (slots <= row) & (slots > row - window)
        start = torch.zeros(len(self._next), device=device).int() if self._start is None else self._start
        own = (seen[None] & (slots >= start[:, None, None]))[:, None]
        # a question begins behind its padding, and its first token follows the prefix
        question, place = self._rows // self._longest, self._rows % self._longest
        index = before + self.length - self._longest + place - start[question]
        prefix = places[site].to(device) > (index - window)[:, None]
        return own, prefix[None, None]

    def mark(self) -> tuple[int, Tensor]:
        """Return the current state of the questions, for `back`."""
        return self.length, self._next

    def back(self, mark: tuple[int, Tensor]) -> None:
        """Forget the tokens that were read since a mark."""
        self.length, self._next = mark

    def keep(self, questions: Tensor) -> None:
        """Continue with only some of the questions, int64 [B']; not to be called during `read`."""
        self._next = self._next[questions]
        self._start = None if self._start is None else self._start[questions.to(self._device)]
        self._own = [(k[questions.to(k.device)], v[questions.to(v.device)]) for k, v in self._own]

    def trace(self, record: Recording, num_tokens: int, length: int, positions: Tensor) -> Trace:
        """Return the trace that explains the last `num_tokens` tokens of a session with one question.

        Args:
            record: The recorded rows.
            num_tokens: How many tokens are explained.
            length: How many of the own positions count.
            positions: Positions of the keys in the whole sequence, [L, M + length].
        """
        keys, values = (
            [
                torch.cat([given, own[i][0, :length].transpose(0, 1)], 1)
                for given, own in zip(shared, self._own, strict=True)
            ]
            for i, shared in enumerate((self.keys, self.values))
        )
        rows = range(keys[0].shape[1] - num_tokens, keys[0].shape[1])
        trace = trace_of(record, keys, values, rows, positions)
        windows = [site.window for site in self.text.sites]
        seen = [
            None if window is None else place > place[rows.start : rows.stop, None] - window
            for window, place in zip(windows, positions, strict=True)
        ]
        return replace(trace, seen=tuple(None if one is None or one.all() else one for one in seen))

    @property
    def nbytes(self) -> int:
        """Bytes of the questions' own keys and values."""
        return sum(tensor.nbytes for pair in self._own for tensor in pair)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Return where the tokens of the pass lie, and where each question begins, for a layer on a device."""
        if device == self._device:
            return self._rows, self._start
        if device not in self._moved:
            self._moved[device] = self._rows.to(device), None if self._start is None else self._start.to(device)
        return self._moved[device]

    def _add(self, site: int, rows: Sequence[Tensor]) -> list[Tensor]:
        """Store the pass's keys and values, [T, Hkv, D] each, and return all of the site, [B, Hkv, length, D] each."""
        self._make_room(site, rows)
        before = self.length - self._longest
        for held, new in zip(self._own[site], rows, strict=True):
            if self._longest == 1:
                held[:, before] = new
            else:
                where, _ = self._on(new.device)
                question, slot = where // self._longest, where % self._longest
                held[question, before + slot] = new
        return [held[:, : self.length].transpose(1, 2) for held in self._own[site]]

    def _make_room(self, site: int, rows: Sequence[Tensor]) -> None:
        """Allocate the positions of a site that the pass needs; `rows` are keys and values like its own."""
        count = len(self._next)
        if site == len(self._own):
            empty = [one.new_zeros(count, self.length + self._room, *one.shape[1:]) for one in rows]
            self._own.append((empty[0], empty[1]))
        elif self._own[site][0].shape[1] < self.length:
            grown = [
                torch.cat([old, old.new_zeros(count, self.length + _ROOM - old.shape[1], *old.shape[2:])], 1)
                for old in self._own[site]
            ]
            self._own[site] = grown[0], grown[1]
