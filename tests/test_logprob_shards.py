"""The increase over shards of the words: that of all words, whatever the cuts, the norm, the way and the backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mllm_fast.kernels import Base, joined_increase, logprob_increase, shard_increase
from mllm_fast.kernels.extension import cpu_extension
from mllm_fast.kernels.logprob_increase.reference import logprob_increase as reference
from oracle import assert_as_good_as, cast, problem, truth_of

needs_extension = pytest.mark.skipif(cpu_extension()[0] is None, reason="the C++ extension is not built")
VARIANTS = [{"kind": "rms"}, {"kind": "layer", "bias": True}, {"kind": "rms", "softcap": 5.0}]


def over_shards(arguments, unembedding, cuts, norm, **choices):
    """Return the increase, each shard computed by itself."""
    parts, mass, start = [], [], 0
    given = dict(arguments)
    residual, values, tokens = (given.pop(name) for name in ("residual", "values", "tokens"))
    final, source = given.pop("final"), given.get("source")
    for stop in [*cuts, len(unembedding.weight)]:
        bias = None if unembedding.bias is None else unembedding.bias[start:stop]
        shard = replace(unembedding, weight=unembedding.weight[start:stop], bias=bias)
        owned = (tokens >= start) & (tokens < stop)
        base = Base(residual, torch.where(owned, tokens - start, -1), shard, norm, final)
        parts.append(shard_increase(base, values, shard, **given, **choices))
        mass.append(base.mass if source is None else base.mass[source])
        start = stop
    return joined_increase(torch.stack(parts), torch.stack(mass))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
@pytest.mark.parametrize("norm", ["frozen", "own"])
@pytest.mark.parametrize("way", ["direct", "factored"])
@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_extension)])
def test_as_good_as_the_whole(backend, way, norm, variant):
    arguments, unembedding = cast(*problem(17, 33, 257, 40, 8, **variant), torch.float32)
    truth = truth_of(arguments, unembedding, norm)
    low = reference(**arguments, unembedding=unembedding, norm=norm)
    for cuts in ([128], [1, 65, 256]):
        got = over_shards(arguments, unembedding, cuts, norm, way=way, backend=backend)
        assert_as_good_as(got, low, truth, magnitude=20)


@pytest.mark.parametrize("norm", ["frozen", "own"])
def test_float64_is_exact(norm):
    arguments, unembedding = problem(3, 9, 57, 24, 5, kind="layer", bias=True)
    truth = reference(**arguments, unembedding=unembedding, norm=norm)
    got = over_shards(arguments, unembedding, [20, 40], norm)
    torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-12)


def test_groups_that_share_a_residual():
    arguments, unembedding = problem(3, 9, 57, 24, 5)
    source = torch.tensor([2, 0, 2, 1])
    each = {name: arguments[name][source] for name in ("residual", "tokens", "final")}
    shared = {
        **arguments,
        "values": arguments["values"][[0, 1, 2, 0]],
        "projection": arguments["projection"][[0, 1, 2, 0]],
    }
    truth = reference(**{**shared, **each}, unembedding=unembedding)
    got = over_shards({**shared, "source": source}, unembedding, [30], "frozen")
    torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-12)


def test_large_writes_and_words_that_cannot_be_said():
    """Writes whose changes of the logits overflow when exponentiated, and a shard that has no word to say."""
    arguments, unembedding = problem(3, 9, 57, 24, 5, bias=True)
    arguments["values"] *= 1e5
    bias = unembedding.bias.clone()
    bias[40:] = -torch.inf
    arguments["tokens"] %= 40
    unembedding = replace(unembedding, bias=bias)
    truth = logprob_increase(**arguments, unembedding=unembedding)
    got = over_shards(arguments, unembedding, [20, 40], "frozen")
    assert truth.isfinite().all()
    assert truth.abs().max() > 1e3
    torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-10)
