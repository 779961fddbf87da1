"""Decoding of many questions over one shared prefix, in joint forward passes.

The tokens of all questions are concatenated into one row of input without padding. Each token attends to the prefix,
whose keys and values are read in place, and to the keys of its own question, which are kept here. The two results are
joined by their log-sum-exps. So a question is computed as if it were asked alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ..models.text_model import TextModel
from .attention import attend_split, join_rows
from .hooks import Recording, recording
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
    ):
        self.text = text
        self.backend = backend
        self.keys, self.values = keys, values
        self.length = 0  # own positions of the longest question; shorter questions begin later
        self._next = torch.full((count,), position)
        self._start: Tensor | None = None
        self._own: list[tuple[Tensor, Tensor]] = []  # a layer's own keys and values, [B, room, Hkv, D]
        self._rows = torch.empty(0, dtype=torch.long)  # where the tokens of the current pass lie in [B, longest]
        self._longest = 0
        self._room = min(expected, _ROOM)

    def recording(self, rows: int = 0) -> AbstractContextManager[Recording]:
        """Return a context manager that attaches the model to this session and records the last `rows` rows.

        `read` works only inside it.
        """
        return recording(self.text, rows, backend=self.backend, attention_fn=self.attend)

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
        positions = (self._next[question] + within).to(self._device)
        self._next = self._next + lengths
        tokens = torch.tensor([[token for one in ids for token in one]], device=self._device)
        hidden = self.text.decoder(
            input_ids=tokens,
            # a ready mask keeps transformers from making one; `attend` knows what each row sees
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self._device),
            position_ids=positions[None],
            use_cache=False,
        ).last_hidden_state
        return self.text.logits(hidden[0, lengths.cumsum(0).to(self._device) - 1])

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Return the attention of the pass's T tokens in one layer.

        Args:
            layer: The number of the layer.
            query: Queries of the tokens, [1, H, T, D].
            key, value: Their own keys and values, [1, Hkv, T, D].
            scale: The factor of the scores.

        Returns:
            [1, H, T, D].
        """
        count, longest = len(self._next), self._longest
        own_key, own_value = (self._add(layer, i, one[0].transpose(0, 1)) for i, one in enumerate((key, value)))
        rows = query[0].transpose(0, 1)  # [T, H, D]
        padded = rows
        if self._start is not None and longest > 1:
            padded = rows.new_zeros(count * longest, *rows.shape[1:])
            padded[self._rows] = rows
        padded = padded.reshape(count, longest, *rows.shape[1:]).transpose(1, 2)
        own = attend_split(padded, own_key, own_value, self._start, scale, causal=True, backend=self.backend)
        keys, values = self.keys[layer][None], self.values[layer][None]
        shared = attend_split(query, keys, values, None, scale, causal=False, backend=self.backend)
        output, total = own.output.transpose(1, 2).flatten(0, 1), own.lse.transpose(1, 2).flatten(0, 1)  # type: ignore[union-attr]
        if self._start is not None and longest > 1:
            output, total = output[self._rows], total[self._rows]
        return join_rows((output, total), shared)

    def mark(self) -> tuple[int, Tensor]:
        """Return the current state of the questions, for `back`."""
        return self.length, self._next

    def back(self, mark: tuple[int, Tensor]) -> None:
        """Forget the tokens that were read since a mark."""
        self.length, self._next = mark

    def keep(self, questions: Tensor) -> None:
        """Continue with only some of the questions, int64 [B']; not to be called during `read`."""
        self._next = self._next[questions]
        chosen = questions.to(self._device)
        self._start = None if self._start is None else self._start[chosen]
        self._own = [(k[chosen], v[chosen]) for k, v in self._own]

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
        return trace_of(record, keys, values, rows, positions)

    @property
    def nbytes(self) -> int:
        """Bytes of the questions' own keys and values."""
        return sum(tensor.nbytes for pair in self._own for tensor in pair)

    @property
    def _device(self) -> torch.device:
        return self.keys[0].device

    def _add(self, layer: int, which: int, rows: Tensor) -> Tensor:
        """Store the pass's keys (or values) [T, Hkv, D], and return all of the layer, [B, Hkv, length, D]."""
        count = len(self._next)
        if layer == len(self._own):
            empty = rows.new_zeros(count, self.length + self._room, *rows.shape[1:])
            self._own.append((empty, torch.zeros_like(empty)))
        elif self._own[layer][which].shape[1] < self.length:
            more = rows.new_zeros(count, self.length + _ROOM, *rows.shape[1:])
            grown = [torch.cat([old, more], 1) for old in self._own[layer]]
            self._own[layer] = grown[0], grown[1]
        held = self._own[layer][which]
        before = self.length - self._longest
        if self._longest == 1:
            held[:, before] = rows
        else:
            question, slot = self._rows // self._longest, self._rows % self._longest
            held[question, before + slot] = rows
        return held[:, : self.length].transpose(1, 2)
