"""Trace: the recorded rows and the KV cache of one answer, in the form that explanations use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
from ..kernels import weighted_values, wide_type
from .hooks import Recording


@dataclass(frozen=True)
class Trace:
    """The recording of one sequence, with T explained rows, L layers, H query heads and N cached positions.

    A row sees the keys up to its own position. If `seen` has an entry for the layer, it sees only the keys marked
    there.

    Attributes:
        residual: h, the input of each layer at the row, [T, L, d].
        query: Rotated queries, [T, L, H, D].
        output: sum_p alpha_jp v_jp of every head, the input of the output projection, [T, L, H, D].
        final: Output of the last layer at the row, [T, d].
        keys, values: One [Hkv, N, D] a layer.
        rows: The position of each explained row.
        seen: Which keys the rows see, one bool [T, N] or None a layer.
        scale: The factor of the attention scores, one a layer.
        positions: Positions of the keys in the whole sequence, int64 [L, N]; None if the cache holds the whole
            sequence.
    """

    residual: Tensor
    query: Tensor
    output: Tensor
    final: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    rows: Sequence[int]
    seen: tuple[Tensor | None, ...]
    scale: tuple[float, ...]
    positions: Tensor | None = None

    def spread(self, values: Tensor, layers: Sequence[int], length: int) -> Tensor:
        """Spread values over the keys of some layers over the whole sequence.

        Args:
            values: Values of the first N' keys of n layers, [n, N'].
            layers: The n layers.
            length: The length of the sequence.

        Returns:
            float32 [n, length], on the CPU, 0 at positions without a key.
        """
        values, count = values.float().cpu(), values.shape[1]
        if self.positions is None:
            return torch.constant_pad_nd(values, (0, length - count))
        return torch.zeros(len(values), length).scatter_(1, self.positions[list(layers), :count], values)

    def attention(self, token: int, layer: int) -> Tensor:
        """Return the attention weights alpha of one row, float32 or wider [H, N'], where N' is its position + 1."""
        stop = self.rows[token] + 1
        keys = self.keys[layer][:, :stop]
        query = self.query[token, layer]
        wide = wide_type(query.dtype)
        heads, width = query.shape
        grouped = query.to(wide).reshape(keys.shape[0], heads // keys.shape[0], width)
        scores = (grouped @ keys.to(wide).mT * self.scale[layer]).reshape(heads, stop)
        seen = self.seen[layer]
        if seen is not None:
            scores = scores.masked_fill(~seen[token, :stop].to(scores.device), -torch.inf)
        return torch.softmax(scores, -1)

    def position_values(self, token: int, heads: Sequence[tuple[int, int]], backend: str = "auto") -> Tensor:
        """Return alpha_jp v_jp of some heads for every position that one row can see, [len(heads), N', D].

        Args:
            token: Index of the row.
            heads: (layer, head) pairs.
            backend: The backend of the kernel.
        """
        seen = [None if mask is None else mask[token] for mask in self.seen]
        return weighted_values(
            self.query[token],
            self.keys,
            self.values,
            heads,
            count=self.rows[token] + 1,
            scale=self.scale,
            seen=seen,
            backend=backend,
        )


def make_trace(
    record: Recording, cache: Any, num_tokens: int, prompt_length: int, batch_index: int | None = None, padding: int = 0
) -> Trace:
    """Join a recording with the cache that the same forward passes filled.

    Args:
        record: The recorded rows.
        cache: The KV cache.
        num_tokens: How many rows are explained. The first one is at position `prompt_length` - 1.
        prompt_length: How many tokens the prompt has, without padding.
        batch_index: Index of the sequence in its batch; None if there is one sequence.
        padding: How many padding tokens precede the sequence. They are left out.

    Raises:
        InputError: The passes did not generate one token each (beams, chunks, guidance, assisted decoding), or the
            cache does not hold every position (a sliding window, an offloaded or quantised cache).
    """
    rows = range(prompt_length - 1, prompt_length - 1 + num_tokens)
    length = rows[-1] + 1
    _check_passes(record, [row + padding for row in rows], one_sequence=batch_index is None)
    batch_index = batch_index or 0
    keys, values = [], []
    for i in range(record.num_layers):
        layer = cache.layers[i]
        k, v = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not isinstance(k, Tensor) or not isinstance(v, Tensor) or k.shape[-2] < padding + length:
            held = k.shape[-2] if isinstance(k, Tensor) else "no"
            raise InputError(
                f"layer {i}'s {type(layer).__name__} holds {held} positions, an explanation needs all {length};"
                " use transformers' default cache and a sequence shorter than the model's sliding window"
            )
        k, v = k[batch_index], v[batch_index]
        if k.device != record.device:
            k, v = k.to(record.device), v.to(record.device)
        if k.shape[1] > length:
            k, v = k[:, padding : padding + length], v[:, padding : padding + length]
        keys.append(k)
        values.append(v)
    return trace_of(record, keys, values, rows, batch_index=batch_index, padding=padding)


def trace_of(
    record: Recording,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    rows: Sequence[int],
    positions: Tensor | None = None,
    batch_index: int = 0,
    padding: int = 0,
) -> Trace:
    """Join a recording of `len(rows)` rows with keys and values, one [Hkv, N, D] a layer; see `Trace`."""
    count, length = len(rows), keys[0].shape[1]
    return Trace(
        residual=_rows(record.residual, batch_index, count),
        query=_rows(record.query, batch_index, count),
        output=_rows(record.output, batch_index, count),
        final=_rows([record.final], batch_index, count)[:, 0],
        keys=tuple(keys),
        values=tuple(values),
        rows=rows,
        seen=tuple(_seen(masks, batch_index, count, length, padding) for masks in record.seen),
        scale=tuple(record.scale),
        positions=positions,
    )


def _check_passes(record: Recording, rows: Sequence[int], one_sequence: bool) -> None:
    """Raise InputError unless the recorded rows are those of the explained tokens, pass after pass."""
    recorded: list[int | None] = []
    for last, hidden in zip(record.last, record.final, strict=True):
        count = hidden.shape[1]
        recorded += [None if last is None else last - count + 1 + i for i in range(count)]
    got = recorded[: len(rows)]
    several = one_sequence and any(len(hidden) > 1 for hidden in record.final)
    if several or len(got) < len(rows) or any(p is not None and p != row for p, row in zip(got, rows, strict=True)):
        raise InputError(
            "the answer was not generated one token a pass (beams, prefill chunks, guidance or assisted decoding):"
            " call generate first and pass its text as answer="
        )


def _rows(layers: list[list[Tensor]], batch_index: int, count: int) -> Tensor:
    """Return the first `count` rows of one sequence, [count, L, ...], from the passes [B, rows, ...] of each layer."""
    joined = [passes[0] if len(passes) == 1 else torch.cat(passes, 1) for passes in layers]
    if len(joined[0]) > 1:
        joined, batch_index = [one[batch_index : batch_index + 1] for one in joined], 0
    return torch.stack(joined, 2)[batch_index, :count]


def _seen(passes: list[Tensor | None], batch_index: int, count: int, length: int, padding: int) -> Tensor | None:
    """Return the masks of the passes as one bool [T, N], or None if every row sees all keys before it."""
    if all(one is None for one in passes):
        return None
    rows: list[Tensor] = []
    for one in passes:
        if one is None:
            rows.append(torch.ones(1, length, dtype=torch.bool))
            continue
        mask = one[min(batch_index, len(one) - 1), :, padding : padding + length].cpu()
        rows.append(torch.nn.functional.pad(mask, (0, length - mask.shape[1]), value=True))
    return torch.cat(rows)[:count]
