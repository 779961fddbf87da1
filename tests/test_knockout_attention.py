"""Equivalence 7 for knockout attention: plain torch, and the compiled kernels on every instruction set, against the
definition in float64.

Tolerance: twice the error that torch's own attention makes in the same precision under the same mask, plus a rounding
of the largest output; in float32 four, and what the output moves by, to first order, where every score is a rounding
off (torch's largest error is in another one). Whatever torch.empty gives is NaN here (`poison`), so an output that is
not written shows, and so is every key and value that must not be read.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mllm_fast.kernels import join, knockout_attention, segment_table
from mllm_fast.kernels.extension import cpu_extension
from mllm_fast.kernels.knockout_attention import SEGMENTS, Attention, cpu_kernel, reference, torch_kernel

EXTENSION, _ = cpu_extension()
SETS = EXTENSION.instruction_sets() if EXTENSION else []
needs_extension = pytest.mark.skipif(EXTENSION is None, reason="the C++ extension is not built")
WAYS = ["torch", *SETS]
READ_TOGETHER = {"amx": 32, "avx512_bf16": 48, "avx512": 48, "avx2": 24, "plain": 8}  # keys; the mass takes 48 on AMX


def key_by_key(way: str, dtype: torch.dtype, together: int, rows: int) -> bool:
    """Whether a kernel reads single keys, not blocks of them, for the rows of a head and of all heads of a key head."""
    if way == "avx512_bf16" and dtype == torch.bfloat16:
        return together <= (16 if rows == 1 else 3)
    return together <= 16 and rows <= 10


@pytest.fixture(scope="module", autouse=True)
def poison():
    """torch.empty gives NaN: what the deterministic mode fills uninitialised memory with."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    assert torch.ones(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@dataclass(frozen=True)
class Problem:
    """One call of the op; `options` are lse and mass."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    segments: torch.Tensor | None = None
    table: torch.Tensor | None = None
    start: torch.Tensor | None = None
    scale: float = 0.25
    options: dict = field(default_factory=lambda: {"lse": False, "mass": False})
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    def arguments(self, dtype: torch.dtype | None = None) -> list:
        operands = [t if dtype is None else t.to(dtype) for t in (self.query, self.key, self.value)]
        masks = self.segments, self.table, self.start
        return [*operands, *masks, self.scale, *self.options.values(), True, self.softcap, self.sinks]

    @property
    def seen(self) -> torch.Tensor:
        """bool [B, R, N]"""
        seen = reference.visible(self.query.shape[2], self.key.shape[2], self.segments, self.table, self.start)
        return seen.expand(len(self.query), -1, -1)


def make(
    heads: int,
    kv_heads: int,
    rows: int,
    keys: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    segments: str = "none",
    padded: bool = False,
    seed: int = 0,
    size: float = 1.0,
    **options,
) -> Problem:
    """Random operands: the query a transposed view, keys and values a part of a longer cache. Segments come in runs, so
    that whole blocks are closed, "shared" by the batch, "own" to each sequence, or a "strided" part of a wider tensor;
    ids reach 31. Padding leaves the first sequence at least one position."""
    gen = torch.Generator().manual_seed(seed)
    draw = lambda *shape: size * torch.randn(*shape, generator=gen)  # noqa: E731
    query = draw(batch, rows, heads, width).to(dtype).transpose(1, 2)
    key, value = (draw(batch, kv_heads, keys + 5, width).to(dtype)[:, :, 2 : keys + 2] for _ in range(2))
    ids, table = None, None
    if segments != "none":
        count = 1 if segments == "shared" else batch
        runs = torch.randint(1, 70, (keys,), generator=gen)
        kinds = torch.tensor([31, 0, 5, 30, 17, 12, 31, 1])
        ids = torch.stack([
            kinds[torch.randint(8, (keys,), generator=gen)].repeat_interleave(runs)[:keys] for _ in range(count)
        ]).to(torch.uint8)  # fmt: skip
        if segments == "strided":
            wide = torch.full((batch, 2 * keys + 3), 255, dtype=torch.uint8)
            wide[:, 1 : 2 * keys + 1 : 2] = ids
            ids = wide[:, 1 : 2 * keys + 1 : 2]
        closed = (torch.rand(SEGMENTS, SEGMENTS, generator=gen) < 0.4).nonzero().tolist()
        table = segment_table(closed)
    start = torch.randint(0, max(1, keys), (batch,), generator=gen, dtype=torch.int32) if padded else None
    options = {"lse": options.get("lse", False), "mass": options.get("mass", False)}
    return Problem(query, key, value, ids, table, start, width**-0.5, options)


def run(way: str, problem: Problem) -> Attention:
    if way == "torch":
        return Attention(*torch_kernel.attention(*problem.arguments()))
    return Attention(*cpu_kernel.attention(*problem.arguments(), isa=way))


def poisoned(problem: Problem, way: str) -> Problem:
    """NaN in the keys and values that the kernel has no reason to read: in blocks as it reads them, those that are all
    padding, or all closed to every row. Plain torch reads everything."""
    if way == "torch":
        return problem
    heads, rows, kv_heads, keys = *problem.query.shape[1:3], *problem.key.shape[1:3]
    together = heads // kv_heads * rows
    block = 1 if key_by_key(way, problem.query.dtype, together, rows) else READ_TOGETHER[way]
    if block == 32 and together <= 16:  # so few rows are not worth tiles
        block = 48
    if block == 32 and problem.options["mass"] is not False:
        block = 96
    padding = torch.zeros(len(problem.key), keys, dtype=torch.bool)
    if problem.start is not None:
        padding = torch.arange(keys) < problem.start[:, None]
    closed = torch.zeros_like(padding)
    if problem.table is not None:
        rule = replace(problem, start=None)
        diagonal = torch.arange(keys)[None] > torch.arange(keys - rows, keys)[:, None]
        closed = (~rule.seen | diagonal).all(1) & ~(diagonal.all(0))
        # a key that some row sees by the table, though none by causality, may be read
        open_ids = [
            [t for t in range(SEGMENTS) if any(not int(problem.table[r]) >> t & 1 for r in ids[keys - rows :].tolist())]
            for ids in problem.segments.expand(len(problem.key), -1)
        ]
        for b, ids in enumerate(problem.segments.expand(len(problem.key), -1)):
            closed[b] = torch.tensor([i not in open_ids[b] for i in ids.tolist()])
    key, value = problem.key.clone(), problem.value.clone()
    for b in range(len(key)):
        for first in range(0, keys, block):
            part = slice(first, first + block)
            if padding[b, part].all() or closed[b, part].all():
                key[b, :, part], value[b, :, part] = torch.nan, torch.nan
    return replace(problem, key=key, value=value)


def check(way: str, problem: Problem) -> Attention:
    """The way's result against the definition in float64, see the top."""
    got = run(way, poisoned(problem, way))
    truth = Attention(*reference.attention(*problem.arguments(torch.float64)))
    dtype = problem.query.dtype
    assert got.output.dtype == dtype
    assert got.output.shape == truth.output.shape
    assert got.output.transpose(1, 2).is_contiguous()
    assert not got.output.isnan().any()
    seen, groups = problem.seen, problem.query.shape[1] // problem.key.shape[1]
    some = seen.any(-1)[:, None].expand(-1, problem.query.shape[1], -1)
    assert (got.output[~some] == 0).all()
    if problem.softcap is None and problem.sinks is None:
        low = F.scaled_dot_product_attention(
            problem.query,
            problem.key.repeat_interleave(groups, 1),
            problem.value.repeat_interleave(groups, 1),
            attn_mask=seen[:, None],
            scale=problem.scale,
        )
    else:
        low = reference.attention(*problem.arguments())[0]
    # a weight's relative error is its score's absolute one
    key, value = (t.double().repeat_interleave(groups, 1) for t in (problem.key, problem.value))
    scores = reference.capped(problem.query.double() @ key.mT * problem.scale, problem.softcap)
    if some.any() and dtype == torch.float32:
        alpha = reference.weights(scores.masked_fill(~seen[:, None], -torch.inf), problem.sinks).nan_to_num(0)
        moved = (alpha * scores.abs() * torch.cdist(truth.output, value, p=torch.inf)).sum(-1).max()
        within(got.output[some], low[some], truth.output[some], 1, 4 * truth.output.abs().max() + moved)
    elif some.any():
        within(got.output[some], low[some], truth.output[some], 1)
    scores = scores.abs().max()
    # by-products are sums in float32 whatever the operands are
    single = Attention(*reference.attention(*problem.arguments(torch.float32)))
    assert (got.lse is None, got.mass is None) == (truth.lse is None, truth.mass is None)
    if got.lse is not None:
        assert got.lse.dtype == torch.float32
        blind = torch.full((got.lse.shape[1],), -torch.inf) if problem.sinks is None else problem.sinks
        torch.testing.assert_close(got.lse[~some], blind[:, None].expand_as(got.lse)[~some], atol=0, rtol=1e-6)
        if some.any():
            within(got.lse[some], single.lse[some], truth.lse[some], 4, scores + 1)
    if got.mass is not None:
        assert got.mass.dtype == torch.float32
        within(got.mass, single.mass, truth.mass, 4, (scores + 1) * truth.mass.max())
    return got


def within(got, low, truth, roundings: float, magnitude: torch.Tensor | None = None) -> None:
    magnitude = truth.abs().max() if magnitude is None else magnitude
    allowed = 2 * (low.double() - truth).abs().max() + roundings * torch.finfo(got.dtype).eps * magnitude
    worst = (got.double() - truth).abs().max()
    assert worst <= allowed, f"error {worst:.2e}, allowed {allowed:.2e}"


SHAPES = [  # heads, key heads, rows, keys, width
    (17, 17, 33, 33, 64),
    (17, 1, 17, 33, 16),
    (17, 1, 257, 257, 16),
    (3, 3, 257, 257, 20),
    (2, 1, 120, 257, 40),
    (4, 2, 33, 257, 80),
    (2, 2, 257, 257, 96),
    (3, 1, 65, 65, 128),
    (2, 1, 33, 33, 256),
    (6, 2, 1, 257, 128),
    (17, 1, 1, 257, 64),
    (8, 2, 4, 33, 20),
    (16, 1, 1, 1300, 256),
    (2, 2, 16, 600, 40),
    (2, 2, 17, 600, 40),
    (1, 1, 1, 1, 16),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_awkward_shapes(way, shape, dtype):
    """Odd counts of heads, rows and keys, every path: with 32 segments and left padding, and without."""
    check(way, make(*shape, dtype, lse=True))
    check(way, make(*shape, dtype, batch=2, segments="own", padded=True, lse=True, mass=True, seed=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("softcap", "sinks"), [(50.0, False), (0.7, True), (None, True)])
@pytest.mark.parametrize("shape", SHAPES[1::4], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_soft_caps_and_sinks(way, shape, softcap, sinks, dtype):
    """Scores far below the cap and far beyond it, sinks that take little and nearly all; rows that see nothing."""
    sizes = torch.linspace(-9, 9, shape[0]) if sinks else None
    extra = {"softcap": softcap, "sinks": sizes}
    check(way, replace(make(*shape, dtype, lse=True, mass=True), **extra))
    masked = make(*shape, dtype, batch=2, segments="own", padded=True, lse=True, mass=True, seed=1, size=2.0)
    check(way, replace(masked, **extra))


@pytest.mark.parametrize("sink", [-1e4, 300.0, 1e4])
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("way", WAYS)
def test_extreme_sinks(way, rows, sink):
    """A sink beyond the range of a float's exponent takes nothing, or all."""
    problem = replace(make(2, 1, rows, 65, 16, lse=True, mass=True), sinks=torch.tensor([sink, 0.0]))
    got = check(way, problem)
    if sink > 0:
        assert (got.output[:, 0] == 0).all()
        assert (got.mass[:, 0] < 1e-37).all()
        torch.testing.assert_close(got.lse[:, 0], torch.full_like(got.lse[:, 0], sink), atol=0, rtol=1e-6)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_extension)])
def test_one_of_two_joined_calls_takes_the_sinks(backend):
    problem = make(4, 2, 1, 40, 16)
    sinks = torch.tensor([-1.0, 0.0, 1.0, 4.0])
    part = lambda keys: (problem.query, problem.key[:, :, keys], problem.value[:, :, keys])  # noqa: E731
    whole = knockout_attention(*part(slice(None)), softcap=2.0, sinks=sinks, backend=backend)
    first = knockout_attention(*part(slice(25)), causal=False, softcap=2.0, lse=True, backend=backend)
    second = knockout_attention(*part(slice(25, None)), softcap=2.0, sinks=sinks, lse=True, backend=backend)
    torch.testing.assert_close(join(first, second), whole.output, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 257])
@pytest.mark.parametrize("way", WAYS)
def test_scores_that_grow(way, rows, dtype):
    """Each key outdoes those before it, by far more than a float's exponent in all: the running peak must follow."""
    problem = make(2, 1, rows, 257, 64, dtype, lse=True)
    direction = torch.randn(64, generator=torch.Generator().manual_seed(1))
    key = torch.linspace(0, 300, 257)[:, None] * direction
    query = (problem.query + 8 * direction) / 8
    check(way, replace(problem, query=query.to(dtype), key=key.to(dtype)[None, None]))


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=120)
@given(data=st.data())
def test_any_problem(way, data):
    """Every combination of sizes, mask, precision and by-products."""
    keys = data.draw(st.integers(1, 150), "keys")
    rows = data.draw(st.one_of(st.just(keys), st.integers(1, min(keys, 5)), st.integers(1, keys)), "rows")
    kv_heads, groups = data.draw(st.integers(1, 3), "key heads"), data.draw(st.integers(1, 5), "groups")
    batch = data.draw(st.integers(1, 3), "batch")
    seed = data.draw(st.integers(0, 2**16), "seed")
    mass = data.draw(st.sampled_from(["none", "all", "some"]), "mass")
    chosen = torch.rand(batch, rows, generator=torch.Generator().manual_seed(seed)) < 0.4
    problem = make(
        kv_heads * groups,
        kv_heads,
        rows,
        keys,
        data.draw(st.sampled_from([16, 20, 33, 40, 64, 80]), "width"),
        data.draw(st.sampled_from([torch.float32, torch.bfloat16]), "dtype"),
        batch,
        data.draw(st.sampled_from(["none", "own", "shared", "strided"]), "segments"),
        data.draw(st.booleans(), "padded"),
        seed,
        lse=data.draw(st.booleans(), "lse"),
        mass={"none": False, "all": True, "some": chosen}[mass],
    )
    softcap = data.draw(st.sampled_from([None, 0.5, 50.0]), "softcap")
    sinks = torch.randn(kv_heads * groups, generator=torch.Generator().manual_seed(seed + 1))
    check(way, replace(problem, softcap=softcap, sinks=sinks if data.draw(st.booleans(), "sinks") else None))


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("way", WAYS)
def test_mass_counts_the_chosen_rows(way, rows):
    """The mean over the chosen rows of each sequence; 0 where none is chosen, and rows that see nothing are zeros."""
    chosen = torch.zeros(3, rows, dtype=torch.bool)
    chosen[0, ::2] = True
    chosen[1, 1] = True
    problem = make(4, 2, rows, 70, 16, batch=3, mass=chosen)
    mass = check(way, problem).mass
    total = mass.sum(-1)
    torch.testing.assert_close(total[:2], torch.ones(2, 4), rtol=0, atol=1e-5)
    assert (mass[2] == 0).all()
    blind = replace(problem, start=torch.tensor([70, 0, 0], dtype=torch.int32))
    assert (check(way, blind).mass[0] == 0).all()


@pytest.mark.parametrize("rows", [2, 100])
@pytest.mark.parametrize("way", WAYS)
def test_rows_that_see_nothing(way, rows):
    """Segment 3 is closed to itself and to all: its rows give zeros and -inf, and nothing of it is read."""
    segments = torch.full((1, 100), 3, dtype=torch.uint8)
    problem = make(4, 4, rows, 100, 16, lse=True, mass=True)
    problem = replace(problem, segments=segments, table=segment_table([(s, 3) for s in range(SEGMENTS)]))
    got = check(way, problem)
    assert (got.output == 0).all()
    assert (got.lse == -torch.inf).all()
    assert (got.mass == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4, 130])
@pytest.mark.parametrize("way", WAYS)
def test_large_scores(way, rows, dtype):
    """The largest score of a row moves by hundreds from block to block, upwards and downwards."""
    for direction in (1, -1):
        problem = make(2, 2, rows, 130, 32, dtype, lse=True, mass=True)
        height = torch.linspace(-60, 60, 130)[:, None] * direction
        key = (problem.key + height * torch.ones(32) / 8).to(dtype)
        query = (problem.query.abs() + 1).to(dtype)
        check(way, replace(problem, query=query, key=key))


@pytest.mark.parametrize("rows", [1, 4, 130])
@pytest.mark.parametrize("way", WAYS)
def test_equal_scores(way, rows):
    """Attention to keys that are all alike is the mean of the values seen."""
    problem = make(2, 1, rows, 130, 16, lse=True)
    problem = replace(problem, key=torch.ones(1, 1, 130, 16))
    got = check(way, problem)
    counts = torch.arange(131 - rows, 131)
    mean = problem.value[0, 0].double().cumsum(0)[130 - rows :] / counts[:, None]
    torch.testing.assert_close(got.output[0, 1].double(), mean, rtol=0, atol=8 * 2**-23)


@pytest.mark.parametrize("broken", ["query", "key", "value"])
@pytest.mark.parametrize("rows", [1, 4, 60])
@pytest.mark.parametrize("way", WAYS)
def test_broken_operands_give_nan(way, rows, broken):
    """A NaN must not vanish: it reaches the rows that it reaches in the definition, or more of its block."""
    problem = make(2, 2, rows, 60, 16, lse=True)
    operand = getattr(problem, broken).clone()
    operand[0, 0, 1 if broken != "query" else 0] = torch.nan
    problem = replace(problem, **{broken: operand})
    got, expected = run(way, problem), reference.attention(*problem.arguments())
    assert expected[0].isnan().any()
    assert got.output[expected[0].isnan()].isnan().all()
    assert not got.output[0, 1].isnan().any()
    if broken != "value":
        assert got.lse[expected[1].isnan()].isnan().all()


@needs_extension
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("rows", [2, 50])
def test_nothing_is_written_beyond_the_outputs(isa, rows):
    heads, keys, width = 3, 50, 20
    problem = make(heads, heads, rows, keys, width)
    sizes = rows * heads * width, heads * rows, heads * keys
    buffers = [torch.full((n + 40,), torch.nan) for n in sizes]
    buffers[2][: sizes[2]] = 0  # the caller gives the mass as zeros
    EXTENSION.attention(
        tuple(t.data_ptr() for t in (problem.query, problem.key, problem.value)), False,
        tuple(t.stride() for t in (problem.query, problem.key, problem.value)), (0, 0, 0, 0), 0, (0.25, 0.0),
        (1, heads, heads, rows, keys, width, keys - rows), (*(b.data_ptr() for b in buffers), 0), 2, isa,
    )  # fmt: skip
    for buffer, size in zip(buffers, sizes, strict=True):
        assert not buffer[:size].isnan().any()
        assert buffer[size:].isnan().all()


@pytest.mark.parametrize("rows", [1, 9, 300])
def test_float64_equals_the_definition(rows):
    """Plain torch serves float64 through "auto", in several blocks of rows too."""
    problem = make(6, 2, rows, 300, 16, torch.float64, batch=2, segments="own", padded=True, lse=True, mass=True)
    truth = reference.attention(*problem.arguments())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_kernel, "_BLOCK_ELEMENTS", 2 * 6 * 300 * 7)
        names = ("segments", "table", "start", "scale", "lse", "mass", "causal", "softcap", "sinks")
        options = dict(zip(names, problem.arguments()[3:], strict=True))
        got = knockout_attention(problem.query, problem.key, problem.value, **options)
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_scale_is_by_default_that_of_the_head_size():
    problem = make(2, 2, 5, 9, 64, torch.float64)
    given_scale = knockout_attention(problem.query, problem.key, problem.value, scale=0.125).output
    assert torch.equal(knockout_attention(problem.query, problem.key, problem.value).output, given_scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_auto_takes_every_precision(dtype):
    problem = make(2, 1, 40, 40, 16, torch.float32)
    operands = [t.to(dtype) for t in (problem.query, problem.key, problem.value)]
    got = knockout_attention(*operands)
    truth = reference.attention(*(t.double() for t in operands), None, None, None, 0.25, False, False)[0]
    assert got.output.dtype == dtype
    assert (got.output.double() - truth).abs().max() <= 4 * torch.finfo(dtype).eps * truth.abs().max()
    assert got.lse is None
    assert got.mass is None


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_extension)])
@pytest.mark.parametrize("shape", [(0, 2, 3, 5), (2, 2, 0, 5), (1, 2, 0, 0)])
def test_empty_calls(backend, shape):
    batch, heads, rows, keys = shape
    query, key = torch.ones(batch, heads, rows, 16), torch.ones(batch, heads, keys, 16)
    got = knockout_attention(query, key, key, lse=True, mass=True, backend=backend)
    assert got.output.shape == query.shape
    assert got.lse.shape == query.shape[:3]
    assert (got.mass == torch.zeros(batch, heads, keys)).all()
