"""skinny_linear: every instruction set against float64, at odd shapes; what it refuses; who is served by what."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mllm_fast.kernels import skinny_linear
from mllm_fast.kernels.extension import cpu_extension
from mllm_fast.kernels.paths import table
from mllm_fast.kernels.skinny_linear import cpu_kernel, torch_kernel

EXTENSION, _ = cpu_extension()
SETS = EXTENSION.instruction_sets() if EXTENSION else []
needs_extension = pytest.mark.skipif(EXTENSION is None, reason="the C++ extension is not built")
F32, BF16 = torch.float32, torch.bfloat16


def draw(rows, columns, depth, types=(F32, F32), bias=True, seed=0):
    gen = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=gen)  # noqa: E731
    x, weight = randn(rows, depth).to(types[0]), randn(columns, depth).to(types[1])
    return x, weight, randn(columns).to(types[1]) if bias else None


def check(got, x, weight, bias):
    """Twice plain torch's error on the same operands, and a rounding of the largest output, of the summands too."""
    truth = torch_kernel.linear(x.double(), weight.double(), None if bias is None else bias.double())
    low = torch_kernel.linear(x, weight, bias)
    assert got.dtype == x.dtype
    assert got.shape == truth.shape
    sums = x.double().abs() @ weight.double().abs().T
    rounding = torch.finfo(got.dtype).eps * truth.abs().max() + torch.finfo(F32).eps * sums.max()
    assert (got - truth).abs().max() <= 2 * (low - truth).abs().max() + rounding


@needs_extension
@pytest.mark.parametrize("isa", SETS)
@settings(max_examples=60)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 40),
    depth=st.integers(1, 100),
    types=st.sampled_from([(F32, F32), (BF16, BF16), (F32, BF16)]),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
@example(rows=1, columns=600, depth=1040, types=(F32, F32), bias=True, seed=0)  # several runs, two threads
@example(rows=2, columns=5, depth=0, types=(F32, F32), bias=True, seed=0)  # the bias alone
@example(rows=13, columns=603, depth=1033, types=(BF16, BF16), bias=False, seed=0)
def test_every_instruction_set(isa, rows, columns, depth, types, bias, seed):
    x, weight, bias = draw(rows, columns, depth, types, bias, seed)
    check(cpu_kernel.linear(x, weight, bias, isa=isa), x, weight, bias)


@needs_extension
def test_a_row_does_not_depend_on_the_others():
    """Answers are the same asked alone and together: the order of a row's sum is its own."""
    x, weight, bias = draw(64, 100, 333)
    whole = cpu_kernel.linear(x, weight, bias)
    for rows in (1, 2, 5, 6, 7, 13, 40):
        assert torch.equal(cpu_kernel.linear(x[:rows], weight, bias), whole[:rows])


@needs_extension
def test_any_shape_and_stride():
    x, weight, bias = draw(24, 70, 50)
    expected = torch.nn.functional.linear(x, weight, bias)
    apart = torch.stack([weight, weight], -1)[..., 0]
    assert not apart.is_contiguous()
    got = skinny_linear(x.view(2, 3, 4, 50), apart, bias, backend="cpu")
    torch.testing.assert_close(got, expected.view(2, 3, 4, 70))
    assert skinny_linear(x[0], weight, backend="cpu").shape == (70,)
    assert skinny_linear(x[:0], weight, backend="cpu").shape == (0, 70)


@needs_extension
def test_nan_stays_in_its_row():
    x, weight, bias = draw(7, 30, 40)
    x[3, 5] = float("nan")
    got = skinny_linear(x, weight, bias, backend="cpu")
    assert got[3].isnan().all()
    assert got[[0, 1, 2, 4, 5, 6]].isfinite().all()


@needs_extension
@pytest.mark.parametrize(
    ("maker", "rows", "size", "dtype", "served"),
    [
        ("AMD", 1, 256, F32, True),
        ("Intel", 2, 256, F32, False),
        ("Intel", 3, 256, F32, True),
        ("Intel", 64, 256, F32, True),
        ("Intel", 65, 256, F32, False),
        ("AMD", 8, 512, BF16, True),
        ("Intel", 9, 512, BF16, False),
        ("AMD", 1, 100, F32, False),  # stays in the caches
        ("AMD", 1, 512, torch.float16, False),
        ("AMD", 1, 512, torch.float64, False),
    ],
)
def test_auto_takes_the_kernel_for_few_rows_of_a_large_weight(monkeypatch, maker, rows, size, dtype, served):
    """As the table has it for the processors of a maker, on whatever processor."""
    used = []
    monkeypatch.setattr(sys.modules["mllm_fast.kernels.skinny_linear"], "paths", lambda: table(SETS, maker))
    monkeypatch.setattr(cpu_kernel, "linear", lambda *_: used.append(True))
    skinny_linear(torch.zeros(rows, size, dtype=dtype), torch.zeros(size, size, dtype=dtype))
    assert bool(used) == served


def test_gradients_flow_by_torch():
    x, weight, bias = draw(2, 300, 300)
    weight.requires_grad_()
    skinny_linear(x, weight, bias).sum().backward()
    torch.testing.assert_close(weight.grad[0], x.sum(0))
    with pytest.raises(ValueError, match="computes no gradients"):
        skinny_linear(x, weight, bias, backend="cpu")


def test_a_narrow_weight_is_not_rounded_to():
    """x in float32 keeps its digits where the weight is bfloat16."""
    x, weight, bias = draw(3, 20, 30, (F32, BF16))
    for backend in ("torch", *(["cpu"] if EXTENSION else [])):
        check(skinny_linear(x, weight, bias, backend=backend), x, weight, bias)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(3, 5)}, r"x is \[..., k\] and weight \[n, k\], got \[2, 4\] and \[3, 5\]"),
        ({"bias": torch.zeros(4)}, r"bias is \[3\], got \[4\]"),
        ({"x": torch.zeros(2, 4, dtype=BF16)}, "no narrower than weight, torch.float32, got torch.bfloat16"),
        ({"x": torch.zeros(2, 4, dtype=torch.int64)}, "x is floating"),
        ({"x": torch.zeros(2, 4, device="meta")}, "x is on cpu as weight is, got meta"),
        ({"backend": "triton"}, "no kernel of that kind"),
        ({"backend": "fast"}, "backend is one of"),
    ],
)
def test_bad_input(change, message):
    arguments = {"x": torch.zeros(2, 4), "weight": torch.zeros(3, 4)} | change
    with pytest.raises(ValueError, match=message):
        skinny_linear(**arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_does_not_widen_the_weight():
    """float32 rows in three parts of bfloat16 err as float32 rows by the widened weight do."""
    for rows, columns, depth in [(1, 40, 24), (33, 1003, 520), (0, 8, 8)]:
        x, weight, bias = (one.cuda() for one in draw(rows, columns, depth, (F32, BF16)))
        x *= torch.logspace(-20, 20, max(1, rows), device="cuda")[:rows, None]
        truth = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        low = torch.nn.functional.linear(x, weight.float(), bias.float())
        with torch.no_grad():
            got = skinny_linear(x, weight, bias)
        assert got.dtype == F32
        sums = x.double().abs() @ weight.double().abs().T + bias.double().abs()
        assert ((got - truth).abs() <= 2 * (low - truth).abs() + 4 * torch.finfo(F32).eps * sums).all()
