"""The layers in plain torch, in any dtype. The other backends are held equal to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import DecoderOutput, KeyStore, LayerWeights, NormWeights, Part

if TYPE_CHECKING:
    from . import DecoderLayers


def prepare(decoder: DecoderLayers) -> Callable[..., DecoderOutput]:
    """Return the function that runs a pass; see `DecoderLayers.__call__`."""

    def run(
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        store: KeyStore,
        parts: Sequence[Part],
        recorded: Sequence[int],
        needed: Sequence[int] | None = None,
    ) -> DecoderOutput:
        _check_places(len(hidden), store, parts)
        kept: tuple[list[Tensor], ...] = [], [], []
        slot, position = store.places.unbind(1)
        for i, layer in enumerate(decoder.layers):
            y = normed(hidden, layer.input_norm)
            query, key, value = (
                F.linear(y, *one).unflatten(1, (-1, decoder.width)) for one in (layer.query, layer.key, layer.value)
            )
            query, key = (
                rotated(normed(x, norm), cos, sin) for x, norm in ((query, layer.query_norm), (key, layer.key_norm))
            )
            store.keys[i][slot, :, position], store.values[i][slot, :, position] = key, value
            output = attended(decoder, i, layer, query, parts)
            for kind, one in zip(kept, (hidden, query, output), strict=True):
                kind.append(one[list(recorded)])
            hidden = hidden + F.linear(output.flatten(1), *layer.output)
            z = normed(hidden, layer.middle_norm)
            inner = _ACTIVATIONS[decoder.activation](F.linear(z, *layer.gate)) * F.linear(z, *layer.up)
            hidden = hidden + F.linear(inner, *layer.down)
        records = [torch.stack(kind, 1) if recorded else None for kind in kept]
        hidden = hidden if needed is None else hidden[list(needed)]
        return DecoderOutput(hidden, normed(hidden, decoder.final), *records)

    return run


def _check_places(rows: int, store: KeyStore, parts: Sequence[Part]) -> None:
    slots, _, positions, _ = store.keys[0].shape
    for slot, position in store.places.tolist():
        if not (0 <= slot < slots and 0 <= position < positions):
            raise ValueError(f"places name a slot and a position that are there, got ({slot}, {position})")
    for part in parts:
        slots, _, positions, _ = part.keys[0].shape
        shown = [mask[0] for mask in part.masks if mask is not None]
        if any(int(segments.max()) > 31 for segments in shown):
            raise ValueError("segments holds ids 0 to 31")
        last = min([positions, *(segments.shape[1] for segments in shown)])
        for row, slot, begin, end, place in part.entries.tolist():
            there = 0 <= row < rows and 0 <= slot < slots and 0 <= begin <= end <= last
            if not there or (part.masks and not 0 <= place < last):
                raise ValueError(
                    f"entries name a row, a slot and keys that are there, got ({row}, {slot}, {begin}, {end}, {place})"
                )


_ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def normed(x: Tensor, norm: NormWeights) -> Tensor:
    """Return the root mean square norm of the last dimension, or x where there is none."""
    if norm.gain is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.gain


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return rows of heads [T, H, D] with their first channels turned by cos and sin [T, Dr]."""
    turning, rest = x[..., : cos.shape[1]], x[..., cos.shape[1] :]
    first, second = turning.chunk(2, -1)
    turned = turning * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
    return torch.cat([turned, rest], -1)


def attended(decoder: DecoderLayers, index: int, layer: LayerWeights, query: Tensor, parts: Sequence[Part]) -> Tensor:
    """Return what each row's heads [T, H, D] find in the parts."""
    out = torch.zeros_like(query)
    group = decoder.heads // decoder.kv_heads
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in query]
    for part in parts:
        mask = part.masks[index] if part.masks else None
        for row, slot, begin, end, place in part.entries.tolist():
            key, value = (x[index][slot, :, begin:end] for x in (part.keys, part.values))
            scores = torch.einsum("kgd,knd->kgn", query[row].unflatten(0, (-1, group)), key) * layer.scale
            if mask is not None:
                segments, table = mask
                ids = segments[slot if len(segments) > 1 else 0].long()
                shut = (table[ids[place]] >> ids[begin:end] & 1).bool()
                scores = scores.masked_fill(shut, -torch.inf)
            found[row].append((scores, value))
    for row, pieces in enumerate(found):
        if not pieces:
            continue
        alpha = torch.softmax(torch.cat([scores for scores, _ in pieces], -1), -1).nan_to_num(0)
        alphas = alpha.split([scores.shape[-1] for scores, _ in pieces], -1)
        out[row] = sum(a @ value for a, (_, value) in zip(alphas, pieces, strict=True)).flatten(0, 1)
    return out
