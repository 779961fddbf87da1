"""The small problems on which the paths are measured, one for each use of the kernels.

The operands are small enough for a calibration of two seconds and large enough that the paths differ as they do in a
model: attention as about a picture of 576 tokens, scores of 600 positions, weights that do not stay in the caches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from .. import paths
from ..decoder_layers import DecoderLayers, KeyStore, LayerWeights, LinearWeights, NormWeights, Part
from ..decoder_layers import cpu_kernel as layers_kernel
from ..knockout_attention import cpu_kernel as attention_kernel
from ..knockout_attention import sdpa, segment_table
from ..logprob_increase import Base, Unembedding
from ..logprob_increase import cpu_kernel as increase_kernel
from ..logprob_increase import torch_kernel as increase_torch
from ..skinny_linear import cpu_kernel as linear_kernel
from ..skinny_linear import torch_kernel as linear_torch
from ..token_scores import TokenScorer
from ..weighted_values import cpu_kernel as weighted_kernel
from ..weighted_values import torch_kernel as weighted_torch
from .timing import Run

ROW_SHARES = 8  # how many times as long as a use the rows of the linear layers take
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_KEYS, _IMAGE, _WIDTH = 640, (5, 581), 128
_COLUMNS, _DEPTH, _COLD = 1024, 1024, 1 << 26  # bytes of weights, read in turn so that they come from memory
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Use(NamedTuple):
    """One use: its name in `paths.USES`, and what makes the run of each path."""

    name: str
    prepare: Callable[[], dict[str, Run]]


def all_uses(sets: Sequence[str]) -> list[Use]:
    """Return every use, with runs for the instruction sets of this processor; "plain" only where there is no other."""
    tried = [one for one in sets if one != "plain"] or ["plain"]
    makers = {
        "knockout_attention": _attention,
        "logprob_increase": _increase,
        "skinny_linear": _linear,
        "weighted_values": _weighted,
        "token_scores": _token,
        "decoder_layers": _layers,
    }
    found = []
    for name in paths.USES:
        op, kind, dtype = name.split("/")
        found.append(Use(name, partial(makers[op], tried, kind, _DTYPES[dtype])))
    return found


def _drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _attention(sets: Sequence[str], kind: str, dtype: torch.dtype) -> dict[str, Run]:
    rows = {"prefill": _KEYS, "few rows": 16, "one row": 1}[kind]
    heads = max(4 if kind == "prefill" else 8, torch.get_num_threads())
    key, value = (_drawn(1, heads, _KEYS, _WIDTH).to(dtype) for _ in range(2))
    query = _drawn(1, heads, rows, _WIDTH).to(dtype)
    ids = torch.full((1, _KEYS), 2, dtype=torch.uint8)
    ids[:, : _IMAGE[0]], ids[:, slice(*_IMAGE)] = 0, 1
    closed = (ids, segment_table([(1, 2)])) if kind == "prefill" else (None, None)  # few rows would read 64 keys
    segments, table = closed
    scale = _WIDTH**-0.5
    kernel = partial(attention_kernel.attention, query, key, value, segments, table, None, scale, False, False)
    runs: dict[str, Run] = {isa: partial(kernel, isa=isa) for isa in sets}
    return runs | {"torch": partial(sdpa.attention, query, key, value, segments, table, None, scale)}


def _increase(sets: Sequence[str], kind: str, dtype: torch.dtype) -> dict[str, Run]:
    vocab, hidden, depth, positions = 4096, 256, 128, 300
    groups = max(1, torch.get_num_threads() // 2)
    unembedding = Unembedding((_drawn(vocab, hidden) / hidden**0.5).to(dtype), torch.ones(hidden, dtype=dtype))
    residual = _drawn(1, hidden)
    base = Base(residual, torch.tensor([1]), unembedding, final=residual, backend="torch")
    operand = (_drawn(vocab, depth) / depth**0.5).to(dtype)
    rest = _drawn(groups, positions, depth), None, operand, None, torch.zeros(groups, dtype=torch.int64)
    runs: dict[str, Run] = {isa: partial(increase_kernel.increase, base, *rest, isa=isa) for isa in sets}
    return runs | {"torch": partial(increase_torch.increase, base, *rest)}


def _weights(dtype: torch.dtype) -> list[Tensor]:
    count = _COLD // (_COLUMNS * _DEPTH * dtype.itemsize)
    return list(torch.full((count, _COLUMNS, _DEPTH), 0.5, dtype=dtype))


def _linear(sets: Sequence[str], kind: str, dtype: torch.dtype) -> dict[str, Run]:
    return {isa: _one_after_another(partial(linear_kernel.linear, isa=isa), 8, _weights(dtype), 4) for isa in sets}


def linear_rows(dtype: str, isa: str) -> tuple[dict[int, Run], dict[int, Run]]:
    """Return runs of `skinny_linear`'s kernel and of torch's linear layer for each number of rows."""
    weights = _weights(_DTYPES[dtype])
    ours = {rows: _one_after_another(partial(linear_kernel.linear, isa=isa), rows, weights) for rows in ROWS}
    theirs = {rows: _one_after_another(linear_torch.linear, rows, weights) for rows in ROWS}
    return ours, theirs


def _one_after_another(compute: Callable, rows: int, weights: list[Tensor], count: int = 0) -> Run:
    """Return what multiplies rows with some of the weights, other ones in each run."""
    x = _drawn(rows, _DEPTH).to(weights[0].dtype)
    each = count or (4 if rows <= 32 else 1)
    place = SimpleNamespace(at=0)

    def run() -> None:
        for _ in range(each):
            compute(x, weights[place.at % len(weights)], None)
            place.at += 1

    return run


def _weighted(sets: Sequence[str], kind: str, dtype: torch.dtype) -> dict[str, Run]:
    layers, heads, width = 4, 8, 64
    keys = [_drawn(heads, _KEYS, width).to(dtype) for _ in range(layers)]
    query = _drawn(layers, heads, width).to(dtype)
    chosen = [(i % layers, i % heads) for i in range(10)]
    rest = query, keys, keys, chosen, _KEYS, [width**-0.5] * layers, [None] * layers
    runs: dict[str, Run] = {isa: partial(weighted_kernel.weighted_values, *rest, isa=isa) for isa in sets}
    return runs | {"torch": partial(weighted_torch.weighted_values, *rest)}


def _token(sets: Sequence[str], kind: str, dtype: torch.dtype) -> dict[str, Run]:
    layers, heads, width, hidden, vocab, positions = 6, 4, 32, 128, 64, 128
    unembedding = Unembedding(_drawn(vocab, hidden), torch.ones(hidden))
    projections = [_drawn(hidden, heads * width) for _ in range(layers)]
    residual, output, final = _drawn(layers, hidden), _drawn(layers, heads, width), _drawn(hidden)
    values = _drawn(10, positions, width)
    chosen = [(i % layers, i % heads) for i in range(10)]

    def run(scorer: TokenScorer) -> None:
        _, logs = scorer.score_heads(residual, output, final, 1)
        scorer.score_positions(logs, final, 1, chosen, values)

    return {isa: partial(run, TokenScorer(unembedding, projections, heads, isa)) for isa in sets}


def _layers(sets: Sequence[str], kind: str, dtype: torch.dtype) -> dict[str, Run]:
    layers, hidden, heads, inner, rows = 2, 512, 8, 1408, 8
    width = hidden // heads

    def linear(out: int, inside: int) -> LinearWeights:
        return LinearWeights((_drawn(out, inside) / inside**0.5).to(dtype))

    norm, none, square = NormWeights(torch.ones(hidden, dtype=dtype), 1e-6), NormWeights(None), linear(hidden, hidden)
    wide, down = linear(inner, hidden), linear(hidden, inner)
    layer = LayerWeights(
        norm, none, none, norm, square, square, square, square, wide, wide, down, width**-0.5
    )  # fmt: skip
    decoder = DecoderLayers([layer] * layers, norm, heads, heads, backend="torch")
    keys = [torch.zeros(1, heads, _KEYS, width, dtype=dtype) for _ in range(layers)]
    first = _KEYS - rows
    places = torch.tensor([(0, first + row) for row in range(rows)])
    entries = torch.tensor([(row, 0, 0, first + row + 1, first + row) for row in range(rows)])
    store, part = KeyStore(keys, keys, places), Part(keys, keys, entries)
    turn = torch.ones(rows, width, dtype=dtype)
    given = _drawn(rows, hidden).to(dtype), turn, 0 * turn, store, [part], ()
    return {isa: partial(layers_kernel.prepare(decoder, isa), *given) for isa in sets}
