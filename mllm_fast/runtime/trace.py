"""What one answer left behind: the recorded rows and the KV cache, as the explanation reads them."""

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
    """One sequence. T explained rows, L layers, H query heads, N cached positions.

    residual [T, L, d]: h, each layer's input at the row. query [T, L, H, D], rotated. output [T, L, H, D]:
    sum_p alpha_jp v_jp of every head, what the output projection reads. final [T, d]: the last
    layer's output at the row. keys, values: one [Hkv, N, D] a layer. rows: the position of each explained
    row; a row sees keys up to itself, and where `seen` has an entry for its layer (bool [T, N]),
    only those. scale: of the attention, one a layer. positions: where the keys lie in the whole sequence, int64 [L, N];
    None where the cache holds all of it.
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
        """Numbers [n, N'] of the first keys of n layers, laid out over a sequence of `length`: float32 [n, length], on
        the CPU, 0 where no key is."""
        values, count = values.float().cpu(), values.shape[1]
        if self.positions is None:
            return torch.constant_pad_nd(values, (0, length - count))
        return torch.zeros(len(values), length).scatter_(1, self.positions[list(layers), :count], values)

    def attention(self, token: int, layer: int) -> Tensor:
        """alpha of one row: float32 or wider [H, N'], N' = its position + 1."""
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
        """alpha_jp v_jp of some heads, (layer, head) each, for every position of one row: [len(heads), N', D]."""
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
    """Join a recording with the cache that the same passes filled.

    `num_tokens` rows are explained, the first at position `prompt_length` - 1, of the sequence `batch_index`
    of a batch, behind `padding` tokens that are left out; None where there is one sequence.

    Raises:
        InputError: the passes were not one a token (beams, chunks, guidance, assisted decoding), or the cache
            does not hold every position (a sliding window, an offloaded or quantised one).
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
    """Join a recording of as many rows as `rows` with keys and values, one [Hkv, N, D] a layer; see `Trace`."""
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
    """The recorded rows, pass after pass, must be those of the explained tokens."""
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
    """The first rows of one sequence, [count, L, ...], of the passes [B, rows, ...] of each layer."""
    joined = [passes[0] if len(passes) == 1 else torch.cat(passes, 1) for passes in layers]
    if len(joined[0]) > 1:
        joined, batch_index = [one[batch_index : batch_index + 1] for one in joined], 0
    return torch.stack(joined, 2)[batch_index, :count]


def _seen(passes: list[Tensor | None], batch_index: int, count: int, length: int, padding: int) -> Tensor | None:
    """The masks of the passes as one [T, N], or None if every row sees all before it."""
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
