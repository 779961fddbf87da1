"""The Triton kernels of logprob_increase against the float64 definition; run by test_triton.py.

The kernels alone get writes that the operand's type can hold, so that their products are exact and float32's
tolerance is due in every type. Through the public op the writes are rounded: the tolerance is then twice the error
of plain torch with writes rounded to that type.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mllm_fast.kernels import OperatorCache, logprob_increase
from mllm_fast.kernels.dispatch import interpreted
from mllm_fast.kernels.logprob_increase import torch_kernel, triton_kernel
from mllm_fast.kernels.logprob_increase.base import Base
from mllm_fast.kernels.logprob_increase.operators import Together, with_longest
from mllm_fast.kernels.logprob_increase.triton_rounding import rounded_writes
from oracle import Drawn, assert_as_good_as, cast, problem, truth_of
from sweep import also

DEVICE = "cpu" if interpreted() else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VARIANTS = [
    {"kind": "rms"},
    {"kind": "layer", "bias": True},
    {"kind": "rms", "softcap": 5.0},
]
warned = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which interprets log 0 and max of NaN
name_of = lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None  # noqa: E731


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory that is not written is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def drawn(*sizes, dtype, **variant):
    """oracle.problem in a type, on the device."""
    arguments, unembedding = cast(*problem(*sizes, **variant), dtype)
    fields = {name: value.to(DEVICE) for name, value in vars(unembedding).items() if isinstance(value, torch.Tensor)}
    return {name: value.to(DEVICE) for name, value in arguments.items()}, replace(unembedding, **fields)


class Given(list):
    """Operators that are there already."""

    nbytes = 0

    @property
    def dtype(self):
        return self[0].dtype

    @property
    def together(self):
        return Together(self)


def draw(groups, rows, vocab, depth, dtype, way="direct", own=False, cap=None, seed=0):
    """The arguments of a kernel alone, without gain; residual vectors are shared and out of order."""
    gen = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=gen).to(DEVICE)  # noqa: E731
    vectors = max(1, groups // 2)
    base = Drawn(
        scale=torch.ones(vectors, device=DEVICE),
        lean=randn(vectors, vocab),
        raw=5 * randn(vectors, vocab),
        cap=cap,
        log_probs=torch.log_softmax(4 * randn(vectors, vocab), -1),
        tokens=torch.randint(vocab, (vectors,), generator=gen).to(DEVICE),
    )
    writes = (2 * randn(groups, rows, depth) / depth**0.5).to(dtype).float()
    count = groups if way == "factored" else 1
    operands = Given(with_longest(randn(vocab, depth), dtype) for _ in range(count))
    # powers of two when added to the scale, so that the operands' type can hold the scaled writes
    shift = torch.tensor([-0.5, 0.0, 1.0])[torch.randint(3, (groups, rows), generator=gen)].to(DEVICE) if own else None
    source = torch.randint(vectors, (groups,), generator=gen).to(DEVICE)
    return base, writes, None, operands if way == "factored" else operands[0], shift, source


def doubled(base, writes, gain, operands, shift, source):
    wide = {name: value.double() for name, value in vars(base).items() if name in ("scale", "lean", "raw", "log_probs")}
    operands = [one.double() for one in operands] if isinstance(operands, list) else operands.double()
    return (
        Drawn(**(vars(base) | wide)),
        writes.double(),
        gain,
        operands,
        shift if shift is None else shift.double(),
        source,
    )


def plain(arguments):
    """The same in plain torch, in the type of the arguments."""
    base, writes, gain, operands, shift, source = arguments
    if isinstance(operands, torch.Tensor):
        return torch_kernel.increase(*arguments)
    return torch.cat([
        plain((base, writes[g : g + 1], gain, one, None if shift is None else shift[g : g + 1], source[g : g + 1]))
        for g, one in enumerate(operands)
    ])  # fmt: skip


def check(arguments, splits=None):
    truth = plain(doubled(*arguments))
    got = triton_kernel.increase(*arguments, splits=splits)
    assert got.dtype == torch.float32
    assert_as_good_as(got, plain(arguments), truth, magnitude=float(truth.abs().max()) + 20)
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *also(torch.float16)])
@pytest.mark.parametrize(
    ("way", "groups", "rows", "vocab", "depth", "splits"),
    [
        ("factored", 17, 33, 403, 64, None),
        ("factored", 2, 257, 1003, 40, 3),
        ("factored", 3, 33, 130, 16, 2),
        ("factored", 2, 33, 193, 128, 1),
        ("factored", 2, 140, 193, 256, None),
        ("factored", 1, 9, 70, 300, 2),
        ("direct", 17, 33, 403, 48, None),
        ("direct", 2, 257, 1003, 200, 3),
        ("direct", 3, 33, 130, 64, 2),
        ("direct", 130, 1, 150, 7, 1),
        ("direct", 9, 127, 257, 33, 4),
    ],
)
@pytest.mark.parametrize("own", [False, True])
def test_kernel_alone(dtype, way, groups, rows, vocab, depth, splits, own):
    check(draw(groups, rows, vocab, depth, dtype, way, own), splits)


@pytest.mark.parametrize("way", ["direct", "factored"])
@pytest.mark.parametrize("own", [False, True])
def test_capped(way, own):
    check(draw(5, 33, 150, 24, torch.bfloat16, way, own, cap=5.0))
    check(draw(2, 133, 150, 24, torch.float32, way, own, cap=30.0), splits=2)


def test_more_blocks_than_a_band():
    """Blocks of rows beyond one band and not a whole number of them, each with all shares."""
    check(draw(10, 121, 200, 16, torch.float32), splits=2)


@warned
@pytest.mark.parametrize("way", ["direct", "factored"])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("masked", [float("-inf"), -1e4])
def test_words_that_cannot_be_said(way, splits, masked):
    """Whole tiles and a whole share of them must not turn the sum into NaN or infinity."""
    arguments = draw(3, 33, 403, 20, torch.bfloat16, way)
    arguments[0].log_probs[:, :290] = masked
    arguments[0].log_probs = torch.log_softmax(arguments[0].log_probs, -1)
    arguments[0].tokens[:] = 399
    check(arguments, splits)


@warned
@pytest.mark.parametrize("way", ["direct", "factored"])
@pytest.mark.parametrize("offset", [-4000.0, 4000.0])
def test_common_shift_of_all_logits(way, offset):
    """Softmax ignores what all words share: increases far beyond float32's exponents must not overflow."""
    arguments = draw(1, 3, 150, 2, torch.float32, way)
    operand = arguments[3][0] if way == "factored" else arguments[3]
    operand *= 0.1
    operand[:, 0] += offset
    arguments[1][:] = 1
    truth = plain(doubled(*arguments))
    got = triton_kernel.increase(*arguments)
    assert (got - truth).abs().max() <= 4 * torch.finfo(torch.float32).eps * abs(offset)


@pytest.mark.parametrize("way", ["direct", "factored"])
@pytest.mark.parametrize("cap", [None, 5.0])
def test_a_zero_write_changes_nothing(way, cap):
    arguments = draw(2, 4, 150, 24, torch.bfloat16, way, cap=cap)
    arguments[1][:, 1] = 0
    got = check(arguments)
    # a rounding of log sum p; a GPU's exponential errs by 2 ** -22, and so does its logarithm, here of up to 2 ** 8
    assert got[:, 1].abs().max() <= (4e-7 if interpreted() else 9 * 2**-22)
    assert got[:, 0].abs().max() > 1e-2


@warned
@pytest.mark.parametrize("height", [-300.0, -90.0, 40.0, 120.0])
def test_a_level_far_from_the_sum(height):
    """The words that choose the level are far above or below all others, or cannot be said: the careful sum is made, or
    need not be, and the result is right either way."""
    arguments = draw(4, 33, 300, 24, torch.float32, "factored")
    base = arguments[0]
    base.log_probs[0, :128] += height
    base.log_probs[1, :128] = -torch.inf
    base.tokens[:] = 250
    check(arguments, splits=1)


def test_nothing_to_do():
    assert triton_kernel.increase(*draw(2, 0, 50, 8, torch.float32)).shape == (2, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2.0**-40, 1.0, 2.0**40])
def test_small_and_large_writes_keep_their_digits(dtype, size):
    """In float16, numbers below 6e-8 are zero and those from 65520 on infinite: a write's size must not matter."""
    writes = draw(3, 5, 50, 24, dtype)[1] * size
    ones, source = torch.ones(3, device=writes.device), torch.arange(3, device=writes.device)
    rounded, factor = rounded_writes(writes, None, ones, None, source, dtype, 1.0)
    assert rounded.dtype == dtype
    assert torch.equal(rounded.float() * factor[..., None], writes)
    largest = rounded.float().abs().amax(-1)
    assert ((largest >= 0.5) & (largest <= 1)).all()


@pytest.mark.parametrize("depth", [7, 128, 300])
def test_writes_are_scaled_and_rounded_in_one_pass(depth):
    """By the norm's scale of their residual vector and each row's own shift, and the gain; zeros, NaN and infinities
    stay what they are."""
    gen = torch.Generator().manual_seed(depth)
    values = torch.randn(5, 9, depth, generator=gen)
    values[0, 0] = 0
    values[1, 1, 3], values[1, 2, 3] = torch.nan, torch.inf
    gain, after, shift = (torch.rand(*size, generator=gen) + 0.5 for size in ((depth,), (2,), (5, 9)))
    source = torch.tensor([1, 0, 0, 1, 1])
    given = [one.to(DEVICE) for one in (values.bfloat16(), gain, after, shift, source)]
    rounded, factor = rounded_writes(*given, torch.float32, 2.5)
    expected = values.bfloat16().float() * (after[source, None] + shift)[..., None] * gain * 2.5
    got = (rounded * factor[..., None]).cpu()
    torch.testing.assert_close(got, expected, rtol=4 * torch.finfo(torch.float32).eps, atol=0, equal_nan=True)
    assert (got[0, 0] == 0).all()


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
@pytest.mark.parametrize("norm", ["frozen", "own"])
@pytest.mark.parametrize("way", ["direct", "factored"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_op_matches_float64_oracle(monkeypatch, dtype, way, norm, variant):
    arguments, unembedding = drawn(5, 33, 257, 48, 16, dtype=dtype, **variant)
    truth = truth_of(arguments, unembedding, norm)
    options = {"unembedding": unembedding, "norm": norm, "way": way}
    got = logprob_increase(**arguments, **options, backend="triton")
    exact = Base.scaled
    monkeypatch.setattr(Base, "scaled", lambda *arguments: exact(*arguments).to(dtype).float())
    low = logprob_increase(**arguments, **options, backend="torch")
    assert_as_good_as(got, low, truth, magnitude=20)
    assert truth.abs().max() > 20 * (got - truth).abs().max(), "the tolerance must mean something"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launches_that_bound_the_operators_made(monkeypatch, dtype):
    """Operators outside the cache are held a few at a time; the result does not depend on how many."""
    arguments, unembedding = drawn(5, 9, 150, 24, 16, dtype=dtype)
    once = logprob_increase(**arguments, unembedding=unembedding, way="factored", backend="triton")
    cache = OperatorCache(1 << 30)
    cache.get((1, cache.state(unembedding, False)), unembedding, arguments["projection"][1], False)
    size = cache.nbytes
    runs = []
    factored = triton_kernel._Problem.factored
    monkeypatch.setattr(triton_kernel, "_MADE_BYTES", 2 * size)
    monkeypatch.setattr(
        triton_kernel._Problem, "factored", lambda self, *rest: runs.append(len(rest[0])) or factored(self, *rest)
    )
    options = {"unembedding": unembedding, "way": "factored", "backend": "triton"}
    for more in (with_cache := {"operators": cache, "keys": list(range(5))}, with_cache, {}):
        got = logprob_increase(**arguments, **options, **more)
        # another number of groups is another split of the vocabulary: roundings differ
        torch.testing.assert_close(got, once, rtol=0, atol=4 * torch.finfo(torch.float32).eps * 20)
    assert runs == [3, 2, 5, 2, 2, 1]


@warned
def test_broken_weights_give_nan():
    """NaN weights must not look like a perfect score."""
    arguments, unembedding = drawn(1, 40, 300, 24, 6, dtype=torch.float32)
    unembedding.weight[7] = float("nan")
    for way in ("direct", "factored"):
        assert logprob_increase(**arguments, unembedding=unembedding, way=way, backend="triton").isnan().all()


@pytest.mark.parametrize("size", [1.0, 1e-3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["direct", "factored"])
def test_the_token_is_no_word(way, dtype, size):
    """As of a shard of the words: what is left is minus the logarithm of the sum, of small writes as well."""
    arguments, unembedding = drawn(3, 9, 64, 32, 16, dtype=dtype)
    arguments["values"] = arguments["values"] * size
    arguments["tokens"] = torch.tensor([-1, 5, -1], device=DEVICE)
    low, truth = (
        logprob_increase(**given, unembedding=one, way=way, backend=backend)
        for given, one, backend in (
            (arguments, unembedding, "triton"),
            (*(cast(*drawn_on_cpu(arguments, unembedding), torch.float64)), "torch"),
        )
    )
    error = (low.cpu().double() - truth).abs().max()
    rounding = 20 * torch.finfo(torch.float32).eps  # of logits in float32
    assert error <= 8 * torch.finfo(dtype).eps * truth.abs().max() + rounding


def drawn_on_cpu(arguments, unembedding):
    """A problem on the CPU, for the definition in float64."""
    fields = {name: value.cpu() for name, value in vars(unembedding).items() if isinstance(value, torch.Tensor)}
    return {name: value.cpu() for name, value in arguments.items()}, replace(unembedding, **fields)
