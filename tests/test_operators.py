"""The operator cache: its budget, its order, and that it never serves an operator of older weights."""

from __future__ import annotations

import pytest
import torch
from mllm_fast.kernels import OperatorCache, Unembedding, weight_state
from mllm_fast.kernels.logprob_increase.operators import Together, make_operator, with_longest
from oracle import problem

UNEMBEDDING = Unembedding(weight=torch.randn(50, 8), gain=torch.rand(8))
PROJECTION = torch.randn(8, 4)
SIZE = 50 * 4 * 4


def test_operator_is_the_product():
    arguments, unembedding = problem(1, 1, 31, 12, 5, kind="layer")
    projection = arguments["projection"][0]
    torch.testing.assert_close(
        make_operator(unembedding, projection, centred=False),
        unembedding.weight @ (unembedding.gain[:, None] * projection),
    )
    centring = torch.eye(12, dtype=torch.float64) - 1 / 12
    torch.testing.assert_close(
        make_operator(unembedding, projection, centred=True),
        unembedding.weight @ (unembedding.gain[:, None] * (centring @ projection)),
    )


def test_budget_and_order():
    cache = OperatorCache(2 * SIZE)
    first = cache.get("a", UNEMBEDDING, PROJECTION, False)
    cache.get("b", UNEMBEDDING, PROJECTION, False)
    assert cache.get("a", UNEMBEDDING, PROJECTION, False) is first
    cache.get("c", UNEMBEDDING, PROJECTION, False)  # "b" is now the least recently used
    assert cache.nbytes == 2 * SIZE
    assert cache.get("a", UNEMBEDDING, PROJECTION, False) is first
    assert "b" not in cache


def test_too_small_a_budget_keeps_nothing():
    cache = OperatorCache(SIZE - 1)
    cache.get("a", UNEMBEDDING, PROJECTION, False)
    assert cache.nbytes == 0


def test_changed_weights_make_a_new_operator():
    unembedding = Unembedding(weight=torch.randn(50, 8))
    projection = torch.randn(8, 4)
    cache = OperatorCache(1 << 20)

    def get():
        full = weight_state(projection), cache.state(unembedding, False)
        return cache.get(full, unembedding, projection, False)

    before = get()
    assert get() is before
    projection.mul_(2)
    torch.testing.assert_close(get(), 2 * before)
    unembedding.weight.mul_(2)
    torch.testing.assert_close(get(), 4 * before)


def test_a_call_finds_what_the_last_one_found():
    """As one list, that keeps what a kernel put beside it, until another one is asked for, made or pushed out."""
    cache, state = OperatorCache(2 * SIZE), OperatorCache.state(UNEMBEDDING, False)
    for key in "ab":
        cache.get((key, state), UNEMBEDDING, PROJECTION, False)
    both = cache.find("ab", state)
    assert isinstance(both, Together)
    assert cache.find("ab", state) is both
    assert cache.find("ba", state)[0] is both[1]
    assert cache.find("ab", "other weights") == [None, None]
    assert cache.find("a", state)[0] is both[0]  # b is the oldest now
    cache.get(("c", state), UNEMBEDDING, PROJECTION, False)
    a, b = cache.find("ab", state)
    assert a is both[0]
    assert b is None
    assert cache.find("ca", state)[1] is a
    cache.clear()
    assert cache.find("ca", state) == [None, None]


def test_the_longest_row_is_stored_behind_a_half_operator():
    for dtype in (torch.bfloat16, torch.float16):
        rows = torch.randn(50, 8)
        stored = with_longest(rows, dtype)
        assert torch.equal(stored, rows.to(dtype))
        behind = torch.as_strided(stored, (2,), (1,), stored.numel()).view(torch.float32)
        torch.testing.assert_close(behind[0], stored.float().norm(dim=1).max())
    assert with_longest(torch.randn(3, 5), torch.bfloat16).shape == (3, 5)


def test_negative_budget():
    with pytest.raises(ValueError, match="budget"):
        OperatorCache(-1)
