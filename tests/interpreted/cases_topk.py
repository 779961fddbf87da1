"""The Triton kernels of topk_compaction against its definition, exactly; run by test_triton.py."""

from __future__ import annotations

import pytest
import torch
from mllm_fast.kernels import topk_compaction
from mllm_fast.kernels.dispatch import interpreted
from mllm_fast.kernels.topk_compaction import triton_kernel
from sweep import also

DEVICE = "cpu" if interpreted() else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(layers=3, positions=300, heads=2, width=40, dtype=torch.float32, seed=0):
    gen = torch.Generator(device=DEVICE).manual_seed(seed)
    mass = torch.randint(0, 40, (layers, positions), generator=gen, device=DEVICE) / 40  # many ties
    where = torch.rand(positions, generator=gen, device=DEVICE)
    rows = [
        [torch.randn(heads, positions, width, generator=gen, device=DEVICE).to(dtype) for _ in range(layers)]
        for _ in range(2)
    ]
    return {"mass": mass, "keys": rows[0], "values": rows[1], "candidates": where < 0.6, "always": where > 0.8}


def check(problem, keep):
    got = topk_compaction(**problem, keep=keep, backend="triton")
    expected = topk_compaction(**problem, keep=keep, backend="torch")
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    return got


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory that is not written shows: NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 40, 129])
def test_matches_the_definition(dtype, width):
    problem = draw(width=width, dtype=dtype)
    got = check(problem, 77)
    assert got.positions.shape == (3, 77 + int(problem["always"].sum()))
    assert not got.keys.isnan().any()


@pytest.mark.parametrize(
    ("positions", "keep"), [(1, 0), (1, 1), (33, 5), (257, 100), (1100, 900), *also((1100, 30), (2051, 900))]
)
def test_lengths(positions, keep):
    problem = draw(layers=2, positions=positions, width=16)
    problem |= {"candidates": torch.ones(positions, dtype=torch.bool, device=DEVICE), "always": None}
    assert check(problem, keep).positions.shape == (2, keep)


@pytest.mark.parametrize("share", [0, 1])
def test_none_or_all(share):
    problem = draw()
    check(problem, share * int(problem["candidates"].sum()))


def test_what_is_no_number():
    problem = draw()
    problem["mass"][0, ::2] = torch.nan
    problem["mass"][1, 1::3] = -torch.inf
    problem["mass"][1, ::3] = torch.nan
    problem["mass"][2] = -0.0
    problem["mass"][2, ::2] = 0.0
    for keep in (3, 90, 150):
        check(problem, keep)


def test_strides_of_a_cache():
    """Rows of [N, Hkv, D], a cache with room to spare, starts that no vector load can take: each as it is."""
    problem = draw(width=24)
    for name in ("keys", "values"):
        turned, roomy, odd = (tensor.clone() for tensor in problem[name])
        roomy_cache = torch.full((2, 350, 24), torch.nan, device=DEVICE)
        roomy_cache[:, :300] = roomy
        odd_memory = torch.full((2, 300, 25), torch.nan, device=DEVICE)
        odd_memory[..., 1:] = odd
        problem[name] = [turned.transpose(0, 1).contiguous().transpose(0, 1), roomy_cache[:, :300], odd_memory[..., 1:]]
    assert triton_kernel.vector(problem["keys"]) == 1
    assert triton_kernel.vector(problem["keys"][:2]) == 4
    check(problem, 50)
    check(problem | {name: [problem[name][0], problem[name][1]] for name in ("keys", "values")}
          | {"mass": problem["mass"][:2]}, 50)  # fmt: skip
