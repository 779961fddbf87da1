"""Trace: the recorded rows and the KV cache of one answer, in the form that explanations use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.errors import InputError
from ..kernels import weighted_values, wide_type, without_autocast
from ..models.text_model import TextModel
from .attention import Scoring
from .record import Recording


@dataclass(frozen=True)
class Trace:
    """The recording of one sequence, with T explained rows, L layers, S attention sites, H query heads, N positions.

    A row sees the keys up to its own position. If `seen` has an entry for the site, it sees only the keys marked there.

    Attributes:
        residual: h, the input of each layer at the row, [T, L, d].
        query: Rotated queries, [T, S, H, D].
        output: What every head gives to the output projection, sum_p alpha_jp v_jp times the gate, [T, S, H, Dv].
        final: Output of the last layer at the row, [T, d].
        keys, values: One [Hkv, N, D] a site, on the device of its layer. All else lies on one device.
        rows: The position of each explained row.
        seen: Which keys the rows see, one bool [T, N] or None a site.
        scoring: How scores become attention weights, one a site.
        positions: Positions of the keys in the whole sequence, int64 [S, N]; None if the cache holds the whole
            sequence.
        gate: The factor between the attention's output and the output projection, one [T, H, Dv] or None a site.
        write_scale: The scale of the norm behind the output projection, [T, S]; None if no site has one.
    """

    residual: Tensor
    query: Tensor
    output: Tensor
    final: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    rows: Sequence[int]
    seen: tuple[Tensor | None, ...]
    scoring: tuple[Scoring, ...]
    positions: Tensor | None = None
    gate: tuple[Tensor | None, ...] = ()
    write_scale: Tensor | None = None

    def spread(self, values: Tensor, sites: Sequence[int], length: int) -> Tensor:
        """Spread values over the keys of some sites over the whole sequence.

        Args:
            values: Values of the first N' keys of n sites, [n, N'].
            sites: The n sites.
            length: The length of the sequence.

        Returns:
            float32 [n, length], on the CPU, 0 at positions without a key.
        """
        values, count = values.float().cpu(), values.shape[1]
        if self.positions is None:
            return torch.constant_pad_nd(values, (0, length - count))
        return torch.zeros(len(values), length).scatter_(1, self.positions[list(sites), :count], values)

    @without_autocast
    def attention(self, token: int, site: int) -> Tensor:
        """Return the attention weights alpha of one row, float32 or wider [H, N'], where N' is its position + 1."""
        stop = self.rows[token] + 1
        keys = self.keys[site][:, :stop]
        query = self.query[token, site, :, : keys.shape[2]].to(keys.device)
        wide = wide_type(query.dtype)
        heads, width = query.shape
        grouped = query.to(wide).reshape(keys.shape[0], heads // keys.shape[0], width)
        scoring = self.scoring[site]
        scores = scoring.scores(grouped, keys.to(wide)).reshape(heads, stop)
        seen = self.seen[site]
        if seen is not None:
            scores = scores.masked_fill(~seen[token, :stop].to(scores.device), -torch.inf)
        return scoring.weights(scores[None, :, None])[0, :, 0]

    @without_autocast
    def position_values(self, token: int, heads: Sequence[tuple[int, int]], backend: str = "auto") -> Tensor:
        """Return what some heads give to the output projection from every position that one row can see.

        It is alpha_jp v_jp times the row's gate.

        Args:
            token: Index of the row.
            heads: (site, head) pairs.
            backend: The backend of the kernel.

        Returns:
            [len(heads), N', Dv].
        """
        found = self._weighted(token, heads, backend)
        gates = [self.gate[site] if self.gate else None for site, _ in heads]
        for one, gate, (_, head) in zip(found, gates, heads, strict=True):
            if gate is not None:
                one.mul_(gate[token, head].to(one))
        return found

    def _weighted(self, token: int, heads: Sequence[tuple[int, int]], backend: str) -> Tensor:
        """Return alpha_jp v_jp, [len(heads), N', Dv]; smaller heads than the largest end with zeros."""
        places = [one.device for one in self.keys]
        if set(places) != {self.query.device}:
            return self._weighted_elsewhere(token, heads, backend)
        stop = self.rows[token] + 1
        shapes = {(*k.shape[::2], *v.shape[::2]) for k, v in zip(self.keys, self.values, strict=True)}
        same = len(shapes) == 1 and self.keys[0].shape[2] == self.values[0].shape[2]
        if same and all(one.plain for one in self.scoring):
            seen = [None if mask is None else mask[token] for mask in self.seen]
            return weighted_values(
                self.query[token],
                self.keys,
                self.values,
                heads,
                count=stop,
                scale=[one.scale for one in self.scoring],
                seen=seen,
                backend=backend,
            )
        width = self.output.shape[-1]
        alphas = {site: self.attention(token, site) for site in {site for site, _ in heads}}
        found = alphas[heads[0][0]].new_zeros(len(heads), stop, width)
        for i, (site, head) in enumerate(heads):
            values = self.values[site]
            value = values[head * len(values) // self.query.shape[2], :stop].to(found)
            found[i, :, : value.shape[1]] = alphas[site][head, :, None] * value
        return found

    def _weighted_elsewhere(self, token: int, heads: Sequence[tuple[int, int]], backend: str) -> Tensor:
        """Return what `_weighted` does for layers on several devices: each is computed where its keys lie."""
        home = self.query.device
        parts: dict[int, Tensor] = {}
        for device in {self.keys[site].device for site, _ in heads}:
            sites = [site for site, keys in enumerate(self.keys) if keys.device == device]
            here = replace(
                self,
                query=self.query[token : token + 1, sites].to(device),
                output=self.output[:1, :1].to(device),
                keys=tuple(self.keys[site] for site in sites),
                values=tuple(self.values[site] for site in sites),
                rows=[self.rows[token]],
                seen=tuple(None if (seen := self.seen[site]) is None else seen[token : token + 1] for site in sites),
                scoring=tuple(self.scoring[site] for site in sites),
            )
            some = [i for i, (site, _) in enumerate(heads) if site in sites]
            found = here._weighted(0, [(sites.index(heads[i][0]), heads[i][1]) for i in some], backend)
            parts |= dict(zip(some, found.to(home), strict=True))
        return torch.stack([parts[i] for i in range(len(heads))])


def make_trace(
    text: TextModel,
    record: Recording,
    cache: Any,
    num_tokens: int,
    prompt_length: int,
    batch_index: int | None = None,
    padding: int = 0,
) -> Trace:
    """Join a recording with the cache that the same forward passes filled.

    Args:
        text: The text part of the model.
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
    for i, site in enumerate(text.sites):
        k, v, kind = held(text, record, cache, i)
        if k is None or v is None or k.shape[-2] < padding + length:
            count = "no" if k is None else k.shape[-2]
            raise InputError(
                f"layer {site.layer}'s {kind} holds {count} positions, an explanation needs all {length}: use"
                " transformers' default cache, and a sequence shorter than the model's sliding window"
            )
        k, v = k[batch_index], v[batch_index]
        if k.shape[1] > length:
            k, v = k[:, padding : padding + length], v[:, padding : padding + length]
        keys.append(k)
        values.append(v)
    return trace_of(record, keys, values, rows, batch_index=batch_index, padding=padding)


def held(text: TextModel, record: Recording, cache: Any, site: int) -> tuple[Tensor | None, Tensor | None, str]:
    """Return the keys and values of a site, [B, Hkv, N, D] each or None, and the name of what holds them.

    A model that caches something else, from which it makes keys and values, has them in the recording. Under autocast
    and in models of several types they are cached as they come, and attended to in the type of the recorded queries.
    """
    place = text.sites[site].cache
    if place is None:
        return *record.attended[site], "recording"
    layer = cache.layers[place]
    found = [getattr(layer, name, None) for name in ("keys", "values")]
    if isinstance(found[0], Tensor) and getattr(layer, "cumulative_length_int", 0) > found[0].shape[-2]:
        found = [None, None]  # a static window that has moved on
    kind = record.query[site][-1].dtype if record.query[site] else None
    keys, values = (one.to(kind or one.dtype) if isinstance(one, Tensor) else None for one in found)
    return keys, values, type(layer).__name__


def keys_and_values(
    text: TextModel, record: Recording, cache: Any, length: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the keys and values of the first `length` positions of one sequence, one [Hkv, N, D] a site.

    Raises:
        InputError: The cache does not hold them as tensors.
    """
    found = [held(text, record, cache, site) for site in range(len(text.sites))]
    for keys, values, kind in found:
        if keys is None or values is None or keys.shape[-2] < length:
            raise InputError(
                f"a {kind} does not hold all keys and values as they are: leave cache_implementation at transformers'"
                " default"
            )
    return tuple(k[0, :, :length] for k, _, _ in found), tuple(v[0, :, :length] for _, v, _ in found)  # type: ignore[index]


def trace_of(
    record: Recording,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    rows: Sequence[int],
    positions: Tensor | None = None,
    batch_index: int = 0,
    padding: int = 0,
) -> Trace:
    """Join a recording of `len(rows)` rows with keys and values, one [Hkv, N, D] a site; see `Trace`."""
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
        scoring=tuple(record.scoring),
        positions=positions,
        gate=tuple(_rows([passes], batch_index, count)[:, 0] if passes else None for passes in record.gate),
        write_scale=_write_scale(record, batch_index, count),
    )


def _write_scale(record: Recording, batch_index: int, count: int) -> Tensor | None:
    """Return the scales of the norms behind the output projections, [count, S], with 1 where there is none."""
    if not any(record.write_scale):
        return None
    found = [_rows([passes], batch_index, count)[:, 0] if passes else None for passes in record.write_scale]
    like = next(one for one in found if one is not None)
    return torch.stack([torch.ones_like(like) if one is None else one for one in found], 1)


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
    """Return the first `count` rows of one sequence, [count, L, ...], from the passes [B, rows, ...] of each layer.

    Where the last dimension differs from layer to layer, shorter ones end with zeros.
    """
    joined = [passes[0] if len(passes) == 1 else torch.cat(passes, 1) for passes in layers]
    if len(joined[0]) > 1:
        joined, batch_index = [one[batch_index : batch_index + 1] for one in joined], 0
    width = max(one.shape[-1] for one in joined)
    joined = [one if one.shape[-1] == width else pad(one, (0, width - one.shape[-1])) for one in joined]
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
        rows.append(pad(mask, (0, length - mask.shape[1]), value=True))
    return torch.cat(rows)[:count]
