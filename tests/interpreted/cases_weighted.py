"""The Triton kernel of weighted_values against its definition; run by test_triton.py."""

from __future__ import annotations

import pytest
import torch
from mllm_fast.kernels import weighted_values
from mllm_fast.kernels.dispatch import interpreted
from mllm_fast.kernels.weighted_values import torch_kernel, triton_kernel
from test_weighted_values import check, draw

DEVICE = "cpu" if interpreted() else "cuda"


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory that is not written is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def moved(query, keys, values, heads, scale, seen):
    to = lambda tensors: [one if one is None else one.to(DEVICE) for one in tensors]  # noqa: E731
    return query.to(DEVICE), to(keys), to(values), heads, scale, to(seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("positions", "width"), [(1, 16), (33, 40), (257, 128), (70, 20)])
@pytest.mark.parametrize("masked", [False, True])
def test_matches_the_definition(dtype, positions, width, masked):
    query, keys, values, heads, scale, seen = moved(*draw(positions, 2, 2, 3, positions, width, dtype, masked))
    seen = [seen[0], None]
    for count in {positions, max(1, positions - 5)}:
        arguments = query, keys, values, heads, count, scale, seen
        check(triton_kernel.weighted_values(*arguments), arguments)


def test_through_the_op():
    query, keys, values, heads, scale, seen = moved(*draw())
    got = weighted_values(query, keys, values, heads, count=30, scale=scale, seen=seen, backend="triton")
    torch.testing.assert_close(got, torch_kernel.weighted_values(query, keys, values, heads, 30, scale, seen))
    none = weighted_values(query, keys, values, [], count=30, scale=scale, backend="triton")
    assert none.shape == (0, 30, 20)


def test_rows_that_begin_anywhere_are_read_one_by_one():
    aligned = [[0, 64, 8, 128, 16, 0]]
    assert triton_kernel.vector(aligned, 2) == 8
    assert triton_kernel.vector(aligned, 4) == 4
    for at, odd in ((1, 66), (2, 9), (3, 130), (4, 17)):
        assert triton_kernel.vector([[odd if i == at else value for i, value in enumerate(aligned[0])]], 2) == 1
