"""The operator cache: its budget, its order, and that it never serves an operator of older weights."""

from __future__ import annotations

import pytest
import torch
from mllm_fast.kernels import OperatorCache, Unembedding, weight_state
from mllm_fast.kernels.logprob_increase.operators import make_operator
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
        (full,) = cache.full_keys([weight_state(projection)], unembedding, False)
        return cache.get(full, unembedding, projection, False)

    before = get()
    assert get() is before
    projection.mul_(2)
    torch.testing.assert_close(get(), 2 * before)
    unembedding.weight.mul_(2)
    torch.testing.assert_close(get(), 4 * before)


def test_negative_budget():
    with pytest.raises(ValueError, match="budget"):
        OperatorCache(-1)
