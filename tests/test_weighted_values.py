"""weighted_values: every backend and instruction set against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mllm_fast.kernels import knockout_attention, weighted_values
from mllm_fast.kernels.extension import cpu_extension
from mllm_fast.kernels.weighted_values import cpu_kernel, torch_kernel

EXTENSION, _ = cpu_extension()
SETS = EXTENSION.instruction_sets() if EXTENSION else []
needs_extension = pytest.mark.skipif(EXTENSION is None, reason="the C++ extension is not built")


def draw(seed=0, layers=2, kv_heads=2, group=3, positions=37, width=20, dtype=torch.float32, masked=True):
    """query, keys, values, heads, scale and seen; the cache's rows are not side by side."""
    gen = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=gen).to(dtype)  # noqa: E731
    query = 2 * randn(layers, kv_heads * group, width)
    caches = [[randn(positions, kv_heads, 2 * width)[..., :width].transpose(0, 1) for _ in range(layers)] for _ in "kv"]
    heads = [(i % layers, int(torch.randint(kv_heads * group, (), generator=gen))) for i in range(5)]
    seen = [torch.rand(positions, generator=gen) < 0.6 for _ in range(layers)]
    for mask in seen:
        mask[0] = True
    return query, *caches, heads, [0.3 + layer for layer in range(layers)], [seen[0] if masked else None, *seen[1:]]


def wide(query, keys, values, heads, count, scale, seen):
    return query.double(), [k.double() for k in keys], [v.double() for v in values], heads, count, scale, seen


def check(got, arguments):
    """Twice plain torch's error in this type, and the rounding of a score, which is its weight's relative error."""
    truth = torch_kernel.weighted_values(*wide(*arguments))
    low = torch_kernel.weighted_values(*arguments)
    assert got.dtype == torch.float32
    query, keys, _, heads, _, scale, _ = wide(*arguments)
    norms = [query[i, h].norm() * keys[i].norm(dim=-1).max() * scale[i] for i, h in heads]
    rounding = torch.finfo(torch.float32).eps * (1 + max(norms)) * truth.abs().max()
    assert (got - truth).abs().max() <= 2 * (low - truth).abs().max() + rounding


@needs_extension
@pytest.mark.parametrize("isa", SETS)
@settings(max_examples=30)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    positions=st.integers(1, 90),
    width=st.integers(1, 70),
    bfloat16=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_every_instruction_set(isa, kv_heads, group, positions, width, bfloat16, masked, seed, data):
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    query, keys, values, heads, scale, seen = draw(seed, 2, kv_heads, group, positions, width, dtype, masked)
    arguments = query, keys, values, heads, data.draw(st.integers(1, positions)), scale, seen
    check(cpu_kernel.weighted_values(*arguments, isa=isa), arguments)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_extension)])
def test_sums_are_the_heads_outputs(backend):
    """Of one layer's heads: the last row of causal attention."""
    query, keys, values, _, scale, _ = draw(layers=1)
    heads = [(0, head) for head in range(6)]
    got = weighted_values(query, keys, values, heads, count=37, scale=scale, backend=backend)
    expected = knockout_attention(
        query[0][None, :, None], keys[0][None].contiguous(), values[0][None].contiguous(), scale=scale[0]
    ).output
    torch.testing.assert_close(got.sum(1), expected[0, :, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_extension)])
def test_what_is_not_seen_is_zero(backend):
    query, keys, values, heads, scale, seen = draw()
    keys[1][:, ~seen[1]] = 1e30  # neither read into the sum
    values[1][:, ~seen[1]] = 7
    got = weighted_values(query, keys, values, heads, count=30, scale=scale, seen=seen, backend=backend)
    assert got.shape == (5, 30, 20)
    for g, (layer, _) in enumerate(heads):
        assert not got[g, ~seen[layer][:30]].any()
        assert got[g, seen[layer][:30]].abs().max() > 0.01


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_extension)])
def test_broken_keys_give_nan(backend):
    query, keys, values, heads, scale, _ = draw()
    keys[0][:, 3, 2] = float("nan")
    got = weighted_values(query, keys, values, heads, count=37, scale=scale, backend=backend)
    for g, (layer, _) in enumerate(heads):
        assert got[g].isnan().all() == (layer == 0)


def test_no_heads():
    query, keys, values, _, scale, _ = draw()
    assert weighted_values(query, keys, values, [], count=3, scale=scale).shape == (0, 3, 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.ones(2, 6)}, "query is floating"),
        ({"query": torch.ones(2, 6, 20, dtype=torch.int64)}, "query is floating"),
        ({"heads": [(2, 0)]}, "heads lie in"),
        ({"heads": [(0, -1)]}, "heads lie in"),
        ({"count": 0}, "count is a number"),
        ({"count": 38}, r"keys\[0\] is \[Hkv, 38 or more"),
        ({"scale": [1.0]}, "scale has one entry a layer, 2, got 1"),
        ({"keys": [torch.ones(2, 37, 20).bfloat16()] * 2}, r"keys\[0\] is torch.float32"),
        ({"keys": [torch.ones(4, 37, 20)] * 2}, "6 a multiple of Hkv"),
        ({"values": [torch.ones(2, 37, 21)] * 2}, r"values\[0\] is \[Hkv"),
        ({"values": [torch.ones(2, 20, 37).mT] * 2}, "stride 1, got 37"),
        ({"values": [torch.ones(1, 37, 20)] * 2}, r"values\[0\] is \[2, 37, 20\]"),
        ({"seen": [torch.ones(37), None]}, r"seen\[0\] is bool"),
        ({"seen": [torch.ones(5, dtype=torch.bool), None]}, r"seen\[0\] is bool"),
        ({"backend": "gpu"}, "backend is one of"),
    ],
)
def test_errors(change, message):
    query, keys, values, _, scale, _ = draw()
    arguments = {"query": query, "keys": keys, "values": values, "heads": [(0, 1)], "count": 37, "scale": scale}
    with pytest.raises(ValueError, match=message):
        weighted_values(**(arguments | change))
