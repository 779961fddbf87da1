"""Rows that come after all keys: a prefix that many questions share, joined with what is each one's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mllm_fast.kernels import Attention, join, knockout_attention
from mllm_fast.kernels.knockout_attention import cpu_kernel, reference, torch_kernel
from test_knockout_attention import WAYS, within

SHAPES = [  # heads, key heads, rows, keys, width
    (4, 2, 1, 33, 64),
    (2, 2, 97, 33, 16),
    (17, 1, 5, 257, 20),
    (2, 1, 257, 130, 128),
    (3, 3, 33, 1, 40),
]


def run(way: str, *arguments) -> Attention:
    kernel = torch_kernel.attention if way == "torch" else cpu_kernel.attention
    return Attention(*kernel(*arguments, **({} if way == "torch" else {"isa": way})))


def draw(heads, kv_heads, rows, keys, width, dtype=torch.float32, batch=2, seed=0) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, rows, heads, width, generator=gen).to(dtype).transpose(1, 2)
    return [query, *(torch.randn(batch, kv_heads, keys, width, generator=gen).to(dtype) for _ in "kv")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_every_key_is_seen(way, shape, dtype):
    operands = draw(*shape, dtype)
    start = torch.tensor([0, shape[3] // 2], dtype=torch.int32)
    rest = (None, None, start, shape[4] ** -0.5, True, False, False)
    got = run(way, *operands, *rest)
    truth = Attention(*reference.attention(*(t.double() for t in operands), *rest))
    low = Attention(*reference.attention(*operands, *rest))
    within(got.output, low.output, truth.output, 4 if dtype == torch.float32 else 1)
    within(got.lse, truth.lse.float(), truth.lse, 8)


@settings(max_examples=30)
@given(sizes=st.tuples(*(st.integers(1, 70) for _ in range(4))), seed=st.integers(0, 99))
def test_joined_parts_are_the_whole(sizes, seed):
    """A prefix and the rows' own keys, in two calls, against one call over both, in float64."""
    prefix, own, rows, pad = sizes
    rows, pad = min(rows, own), min(pad, own)
    query, key, value = (t.double() for t in draw(4, 2, rows, prefix + own, 16, seed=seed))
    key[1, :, :prefix], value[1, :, :prefix] = key[0, :, :prefix], value[0, :, :prefix]
    start = torch.tensor([pad, 0], dtype=torch.int32)
    mine = knockout_attention(query, key[:, :, prefix:], value[:, :, prefix:], start=start, lse=True)
    together = query.transpose(0, 1).flatten(1, 2)[None]  # the prefix is one sequence's, read by all rows
    shared = knockout_attention(together, key[:1, :, :prefix], value[:1, :, :prefix], causal=False, lse=True)
    apart = Attention(*(t[0].unflatten(1, (2, rows)).transpose(0, 1) for t in shared[:2]), None)
    seen = reference.visible(rows, prefix + own, None, None, None).expand(2, -1, -1).clone()
    seen[0, :, prefix : prefix + pad] = False
    scores = (query @ key.repeat_interleave(2, 1).mT / 4).masked_fill(~seen[:, None], -torch.inf)
    expected = torch.softmax(scores, -1) @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(join(apart, mine), expected, rtol=0, atol=1e-13)


def test_a_row_without_any_key_is_zero():
    nothing = torch.full((1, 1, 1), -torch.inf)
    some = Attention(torch.ones(1, 1, 1, 16), torch.zeros(1, 1, 1), None)
    none = Attention(torch.zeros(1, 1, 1, 16), nothing, None)
    assert (join(none, none) == 0).all()
    assert (join(some, none) == 1).all()


@pytest.mark.parametrize("change", [{"mass": True}, {"segments": torch.zeros(2, 3, dtype=torch.uint8)}])
def test_goes_without_segments_and_mass(change):
    table = {"table": torch.zeros(32, dtype=torch.int32)} if "segments" in change else {}
    with pytest.raises(ValueError, match="causal=False goes without segments and mass"):
        knockout_attention(*draw(1, 1, 5, 3, 16), causal=False, **change, **table)
