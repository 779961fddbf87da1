"""Equivalences 4 and 7: factored = direct = a float64 oracle, on every backend and instruction set.

Tolerance: see oracle.assert_as_good_as (twice the float32 reference's own error, plus logit rounding).
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mllm_fast.kernels import Base, Unembedding, logprob_increase
from mllm_fast.kernels.extension import cpu_extension
from mllm_fast.kernels.logprob_increase import cpu_kernel, torch_kernel
from mllm_fast.kernels.logprob_increase.reference import logprob_increase as reference
from oracle import Drawn, assert_as_good_as, cast, problem, truth_of

EXTENSION, _ = cpu_extension()
SETS = EXTENSION.instruction_sets() if EXTENSION else []
needs_extension = pytest.mark.skipif(EXTENSION is None, reason="the C++ extension is not built")
VARIANTS = [
    {"kind": "rms"},
    {"kind": "rms", "bias": True},
    {"kind": "layer", "bias": True},
    {"kind": "rms", "softcap": 5.0},
    {"kind": "layer", "bias": True, "softcap": 5.0},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
@pytest.mark.parametrize("norm", ["frozen", "own"])
@pytest.mark.parametrize("way", ["direct", "factored"])
@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_extension)])
def test_matches_float64_oracle(backend, way, norm, variant):
    arguments, unembedding = problem(17, 33, 257, 40, 8, **variant)
    low_arguments, low = cast(arguments, unembedding, torch.float32)
    truth = truth_of(low_arguments, low, norm)
    reference_low = reference(**low_arguments, unembedding=low, norm=norm)
    got = logprob_increase(**low_arguments, unembedding=low, norm=norm, way=way, backend=backend)
    assert got.dtype == torch.float32
    assert got.shape == (17, 33)
    assert_as_good_as(got, reference_low, truth, magnitude=20)


@pytest.mark.parametrize("norm", ["frozen", "own"])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_float64_is_exact(norm, kind):
    """In float64 only roundings are left between the two ways and the definition."""
    arguments, unembedding = problem(3, 9, 57, 24, 5, kind=kind, bias=True)
    truth = reference(**arguments, unembedding=unembedding, norm=norm)
    for way in ("direct", "factored"):
        got = logprob_increase(**arguments, unembedding=unembedding, norm=norm, way=way)
        torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", ["direct", "factored"])
@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_extension)])
def test_bfloat16_weights(backend, way):
    """Direct: bfloat16 weights are exact operands, so float32's tolerance holds. Factored: the operator is
    rounded to bfloat16, which the tolerance takes from the same rounding in the float64 reference."""
    arguments, unembedding = problem(5, 33, 257, 64, 16)
    arguments, unembedding = cast(arguments, unembedding, torch.bfloat16)
    truth = truth_of(arguments, unembedding, "frozen")
    wide, single = cast(arguments, unembedding, torch.float32)
    got = logprob_increase(**arguments, unembedding=unembedding, way=way, backend=backend)
    if way == "direct":
        assert_as_good_as(got, reference(**wide, unembedding=single), truth, magnitude=20)
        return
    double_arguments, double = cast(arguments, unembedding, torch.float64)
    scale = torch.rsqrt(double_arguments["final"].square().mean(-1) + double.eps)
    delta = double.times(double_arguments["projection"][0]) @ double_arguments["values"][0].T * scale[0]
    rounding = 2**-9 * double_arguments["values"].norm(dim=-1).max() * scale.max() * double.weight.norm(dim=1).max()
    assert (got.double() - truth).abs().max() <= 2 * rounding
    assert delta.abs().max() > 20 * (got.double() - truth).abs().max(), "the tolerance must mean something"


@needs_extension
@pytest.mark.parametrize("isa", SETS)
@settings(max_examples=40)
@given(
    groups=st.integers(1, 4),
    rows=st.integers(1, 70),
    vocab=st.integers(2, 300),
    depth=st.integers(1, 300),
    bfloat16=st.booleans(),
    lean=st.booleans(),
    offset=st.booleans(),
    gain=st.booleans(),
    cap=st.sampled_from([None, 3.0]),
    seed=st.integers(0, 2**16),
)
def test_every_instruction_set(isa, groups, rows, vocab, depth, bfloat16, lean, offset, gain, cap, seed):
    """Equivalence 7 for the kernel alone, at odd sizes: the float64 torch kernel is the oracle, the float32
    one gives the tolerance."""
    gen = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=gen)  # noqa: E731
    operands = [draw(vocab, depth).bfloat16() if bfloat16 else draw(vocab, depth) for _ in range(groups)]
    base = Drawn(
        scale=0.5 + torch.rand(2, generator=gen),
        lean=4 * draw(2, vocab),
        offset=draw(vocab) if offset else None,
        cap=cap,
        tokens=torch.randint(vocab, (2,), generator=gen),
    )
    arguments = [2 * draw(groups, rows, depth) / depth**0.5, draw(depth) if gain else None]
    rest = [0.3 * draw(groups, rows) if lean else None, torch.randint(2, (groups,), generator=gen)]
    several = gain or groups == 3  # one operand for all groups, or one for each
    low = torch_kernel.increase(base, *arguments, Given(operands) if several else operands[0], *rest)
    got = cpu_kernel.increase(base, *arguments, Given(operands) if several else operands[0], *rest, isa=isa)
    double = [None if a is None else a.double() for a in (*arguments, rest[0])]
    wide = [one.double() for one in operands]
    truth = torch_kernel.increase(doubled(base), *double[:2], Given(wide) if several else wide[0], double[2], rest[1])
    assert_as_good_as(got, low, truth, magnitude=float(truth.abs().max()) + 20)


class Given(list):
    """Operators that are there already."""

    nbytes, together = 0, None

    def at_hand(self, group: int) -> bool:
        return True


def doubled(base: Drawn) -> Drawn:
    fields = {"scale": base.scale, "lean": base.lean, "offset": base.offset}
    wide = {name: None if field is None else field.double() for name, field in fields.items()}
    return Drawn(**wide, cap=base.cap, tokens=base.tokens)


def flat(logits: torch.Tensor, token: int = 0, offset: torch.Tensor | None = None) -> Drawn:
    """One residual vector of these logits."""
    return Drawn(scale=torch.ones(1), lean=logits, offset=offset, cap=None, tokens=torch.tensor([token]))


@needs_extension
@pytest.mark.parametrize("isa", SETS)
def test_every_output_is_written(isa):
    """The output buffer is poisoned: a forgotten row stays NaN. One operand for all groups, or one for each."""
    for operands in ([torch.randn(19, 7)], [torch.randn(19, 7) for _ in range(3)]):
        values, scale = torch.randn(3, 13, 7), torch.ones(1)
        logs = torch.log_softmax(torch.randn(1, 19), -1)
        names, out = torch.zeros(4, dtype=torch.int64), torch.full((41,), float("nan"))
        EXTENSION.increase(
            values.data_ptr(), [one.data_ptr() for one in operands], False, (names.data_ptr(), names.data_ptr()),
            (scale.data_ptr(), 0, 0), (logs.data_ptr(), 0, 0), 0.0, (1, 3, 13, 19, 7), out.data_ptr(), 3, isa,
        )  # fmt: skip
        assert not out[:39].isnan().any()
        assert out[39:].isnan().all(), "the kernel wrote past its rows"


@needs_extension
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("offset", [-4000.0, -400.0, 400.0])
def test_common_shift_of_all_logits(isa, offset):
    """Softmax ignores what all words share: increases far beyond float32's exponents must not overflow, and cost a
    rounding of the logits alone."""
    values = torch.ones(1, 3, 2)
    operand = torch.randn(50, 2) * 0.1
    operand[:, 0] += offset
    base, source = flat(torch.randn(1, 50), token=7), torch.zeros(1, dtype=torch.int64)
    got = cpu_kernel.increase(base, values, None, operand, None, source, isa=isa)
    truth = torch_kernel.increase(doubled(base), values.double(), None, operand.double(), None, source)
    torch.testing.assert_close(got.double(), truth, rtol=0, atol=4 * abs(offset) * torch.finfo(torch.float32).eps)


@needs_extension
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("masked", [float("-inf"), -1e4])
@pytest.mark.parametrize("count", [40, 700])
def test_words_that_cannot_be_said(isa, masked, count):
    """A bias of -inf, or a large finite one, masks words, as some heads do for their padding; whole blocks of
    them must not turn the sum into NaN or infinity."""
    bias = torch.tensor([masked] * count + [0.0] * 3)
    base = flat(torch.cat([torch.randn(1, count), torch.tensor([[1.0, 2.0, 0.5]])], 1), token=count + 1, offset=bias)
    values, operand, source = torch.randn(1, 35, 3), torch.randn(count + 3, 3), torch.zeros(1, dtype=torch.int64)
    got = cpu_kernel.increase(base, values, None, operand, None, source, isa=isa)
    truth = torch_kernel.increase(doubled(base), values.double(), None, operand.double(), None, source)
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_extension)])
def test_broken_weights_give_nan(backend):
    """NaN weights must not look like a perfect score."""
    arguments, unembedding = cast(*problem(1, 40, 300, 24, 6), torch.float32)
    unembedding.weight[7] = float("nan")
    assert logprob_increase(**arguments, unembedding=unembedding, backend=backend).isnan().all()


def test_own_norm_of_a_write_that_cancels():
    """h + w = 0 has a norm of 0, which eps keeps finite."""
    arguments, unembedding = cast(*problem(1, 3, 57, 24, 6), torch.float32)
    arguments |= {"values": -arguments["residual"][:, None].repeat(1, 3, 1), "projection": None}
    assert logprob_increase(**arguments, unembedding=unembedding, norm="own").isfinite().all()


@pytest.mark.parametrize("norm", ["frozen", "own"])
def test_a_zero_write_changes_nothing(norm):
    arguments, unembedding = cast(*problem(2, 4, 57, 24, 6), torch.float32)
    arguments["values"][:, 1] = 0
    got = logprob_increase(**arguments, unembedding=unembedding, norm=norm)
    assert got[:, 1].abs().max() <= 2e-7  # a rounding of log sum p
    assert got[:, 0].abs().max() > 1e-3


@pytest.mark.parametrize("norm", ["frozen", "own"])
@pytest.mark.parametrize("way", ["direct", "factored"])
def test_groups_may_share_a_residual(way, norm):
    arguments, unembedding = problem(2, 9, 57, 24, 6)
    source = torch.tensor([1, 0, 1])
    values, projection = (torch.cat([arguments[n], arguments[n][:1]]) for n in ("values", "projection"))
    shared = arguments | {"values": values, "projection": projection}
    got = logprob_increase(**shared, unembedding=unembedding, source=source, way=way, norm=norm)
    each = shared | {name: arguments[name][source] for name in ("residual", "final", "tokens")}
    expected = reference(**each, unembedding=unembedding, norm=norm)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="source lies in"):
        logprob_increase(**shared, unembedding=unembedding, source=source + 1)


@pytest.mark.parametrize("norm", ["frozen", "own"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_extension)])
def test_calls_share_the_logits_at_a_residual(backend, variant, norm):
    """Of residual vectors that are known already, in any order: the same numbers, to the bit."""
    arguments, unembedding = cast(*problem(3, 9, 57, 24, 6, **variant), torch.float32)
    base = Base(arguments["residual"], arguments["tokens"], unembedding, norm, arguments["final"])
    for way in ("direct", "factored"):
        expected = logprob_increase(**arguments, unembedding=unembedding, norm=norm, way=way, backend=backend)
        shared = {name: arguments[name].flip(0) for name in ("values", "projection")}
        got = logprob_increase(
            base, **shared, unembedding=unembedding, source=torch.tensor([2, 1, 0]), way=way, backend=backend
        )
        assert torch.equal(got.flip(0), expected)


def test_a_base_says_what_is_missing_or_too_much():
    arguments, unembedding = cast(*problem(2, 3, 57, 24, 6), torch.float32)
    residual, values, tokens, final = (arguments[name] for name in ("residual", "values", "tokens", "final"))
    base = Base(residual, tokens, unembedding, final=final)
    more = {"projection": arguments["projection"]}
    for name, value in (("tokens", tokens), ("final", final)):
        with pytest.raises(ValueError, match="tokens and final belong to a Base already"):
            logprob_increase(base, values, unembedding=unembedding, **more, **{name: value})
    with pytest.raises(ValueError, match="tokens is needed"):
        logprob_increase(residual, values, unembedding=unembedding, **more)
    with pytest.raises(ValueError, match="unembedding is needed"):
        logprob_increase(base, values, **more)
    with pytest.raises(ValueError, match=r"tokens lie in -1 .. 56, got 0 .. 57"):
        Base(residual, torch.tensor([0, 57]), unembedding, final=final)


def test_auto_way_counts_the_operator():
    """Few rows do not pay for an operator, many do, and a cached one costs nothing."""
    from mllm_fast.kernels import OperatorCache
    from mllm_fast.kernels.logprob_increase import Operators, _cheaper_way

    arguments, unembedding = problem(1, 4, 400, 64, 8)
    values, projection = arguments["values"], arguments["projection"]
    made = Operators(unembedding, projection, False, None, None)
    assert _cheaper_way(values, unembedding, None) == "direct"
    assert _cheaper_way(values, unembedding, made) == "direct"
    assert _cheaper_way(values.repeat(1, 50, 1), unembedding, made) == "factored"
    cache = OperatorCache(1 << 20)
    first = Operators(unembedding, projection, False, cache, ["head"])
    assert _cheaper_way(values, unembedding, first) == "direct"
    made = first[0]
    second = Operators(unembedding, projection, False, cache, ["head"])
    assert _cheaper_way(values, unembedding, second) == "factored"
    assert second[0] is made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "mine"}, "norm is one of"),
        ({"way": "fast"}, "way is one of"),
        ({"backend": "cuda"}, "backend is one of"),
        ({"final": None}, "needs final"),
        ({"residual": torch.zeros(2, 7)}, "residual is"),
        ({"values": torch.zeros(2, 4, 9)}, "values is"),
        ({"values": torch.zeros(2, 4, 0), "projection": torch.zeros(2, 24, 0)}, "k >= 1"),
        ({"tokens": torch.tensor([0, 57])}, "tokens lie in"),
        ({"tokens": torch.tensor([0.0, 1.0])}, "tokens is int64"),
        ({"projection": None, "way": "factored"}, "needs `projection`"),
        ({"keys": ["a", "b"]}, "go together"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments, unembedding = cast(*problem(2, 4, 57, 24, 6), torch.float32)
    with pytest.raises(ValueError, match=message):
        logprob_increase(**(arguments | change), unembedding=unembedding)


def test_explicit_backend_is_never_replaced():
    arguments, unembedding = problem(2, 4, 57, 24, 6)
    with pytest.raises(ValueError, match="float64"):
        logprob_increase(**arguments, unembedding=unembedding, backend="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"kind": "batch"}, "kind is"), ({"softcap": -1.0}, "softcap is"), ({"gain": torch.ones(3)}, "gain has shape")],
)
def test_bad_unembedding(change, message):
    with pytest.raises(ValueError, match=message):
        Unembedding(**({"weight": torch.zeros(5, 4)} | change))
