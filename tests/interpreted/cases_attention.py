"""Knockout attention's Triton kernels against the definition in float64; run by tests/test_triton.py.

Every buffer that a kernel is to fill begins as NaN, and so do the blocks of keys and values that no row sees and what
lies behind the last key: reading any of it shows. Tolerance: see oracle.assert_as_good_as; the reference is torch's own
attention in the same type, and a kernel may round the largest output once more. A GPU's exponential and logarithm err
by 2 ** -22 of their results. On a GPU float32 is made of three products of tf32, which keep 21 bits of each factor: a
score errs by 2 ** -21 of its sum of absolute products, and a weight by that.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from mllm_fast.kernels.dispatch import interpreted
from mllm_fast.kernels.knockout_attention import knockout_attention, segment_table, triton_kernel
from mllm_fast.kernels.knockout_attention.reference import attention as reference
from mllm_fast.kernels.knockout_attention.reference import visible
from mllm_fast.kernels.knockout_attention.torch_kernel import attention as plain_torch
from mllm_fast.kernels.knockout_attention.triton_attend import count_bits, first_bit, survey
from mllm_fast.kernels.knockout_attention.triton_mass import survey_rows
from oracle import assert_as_good_as
from sweep import also

DEVICE = "cpu" if interpreted() else "cuda"
HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
SMALL = triton_kernel.Config(16, 16, 4, 2, chunk=4)  # many blocks at few positions


class Case(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    keys: int
    rows: int
    width: int
    dtype: torch.dtype
    segments: str = "own"  # "own" of each sequence, "shared" by all, "one" for all positions, "none"
    padding: bool = True
    mass: object = True  # True, False, "some" rows or "no" rows
    lse: bool = True
    small: bool = True
    splits: bool = False  # that there are several
    scale: float | None = None
    described: bool = False  # keys and values by the copy engine
    softcap: float | None = None
    sinks: bool = False


CASES = [
    Case(2, 4, 2, 65, 65, 16, BRAIN, "shared", mass="some"),
    Case(2, 2, 1, 65, 65, 40, FLOAT, scale=0.3),
    Case(2, 2, 2, 65, 65, 16, FLOAT, "none", mass="some"),
    Case(1, 2, 2, 65, 51, 16, FLOAT, "one"),  # the first row is just before the last key of a block
    Case(1, 2, 2, 65, 51, 16, FLOAT, "none"),
    Case(1, 2, 2, 64, 64, 16, HALF, "none", padding=False, mass=False, lse=False),
    Case(1, 17, 17, 33, 33, 16, BRAIN, padding=False, mass="no"),
    Case(1, 1, 1, 65, 39, 16, FLOAT, splits=True, mass="some"),
    Case(1, 1, 1, 64, 33, 16, FLOAT, "none", splits=True, mass=False, lse=False),
    Case(1, 4, 2, 97, 5, 80, BRAIN, splits=True, mass="some"),
    Case(1, 6, 1, 97, 5, 16, FLOAT, "none", splits=True, mass="no"),
    Case(2, 4, 2, 65, 3, 40, FLOAT, "shared", mass=False, lse=False, splits=True),
    Case(2, 2, 1, 129, 65, 40, BRAIN, described=True, mass="some"),
    Case(2, 2, 2, 65, 51, 32, HALF, "none", described=True, mass=False),
    Case(1, 1, 1, 65, 39, 16, BRAIN, "shared", described=True, splits=True, mass=False, lse=False),
    Case(2, 4, 2, 65, 65, 40, HALF, softcap=50.0, sinks=True),
    Case(2, 2, 1, 65, 65, 40, FLOAT, scale=0.9, softcap=0.5, mass="some"),
    Case(1, 6, 1, 97, 5, 16, FLOAT, splits=True, softcap=2.0, sinks=True),
    Case(2, 17, 1, 65, 1, 16, HALF, splits=True, sinks=True),
    Case(2, 4, 2, 65, 3, 40, FLOAT, "shared", splits=True, softcap=1.0, mass=False),
    Case(2, 4, 2, 65, 65, 16, BRAIN, described=True, softcap=5.0, sinks=True),
    Case(1, 4, 2, 33, 9, 80, FLOAT, "none", small=False, softcap=3.0, sinks=True, mass="some"),
    # the tiles that the launch chooses
    Case(1, 2, 1, 257, 257, 80, HALF, small=False, described=True, mass=False),
    Case(1, 2, 1, 129, 49, 256, BRAIN, "none", small=False, described=True, mass=False, splits=True),
    Case(1, 2, 1, 257, 257, 80, HALF, small=False),
    Case(1, 2, 1, 257, 257, 64, BRAIN, small=False, mass="some"),
    Case(1, 2, 1, 129, 129, 128, FLOAT, small=False, mass="some"),
    Case(1, 1, 1, 97, 97, 256, BRAIN, "none", small=False, mass=False, splits=True),
    Case(1, 1, 1, 33, 33, 256, FLOAT, small=False, splits=False),
    Case(1, 6, 2, 257, 1, 128, BRAIN, small=False, splits=True),
    Case(1, 2, 1, 257, 1, 64, FLOAT, small=False, splits=True, mass="some"),
    Case(1, 1, 1, 33, 33, 256, HALF, small=False, mass=False),
    Case(1, 4, 4, 33, 9, 80, FLOAT, "none", small=False, mass="some"),
    Case(1, 2, 1, 1, 1, 16, HALF, "none", small=False, padding=False),
    # what others have together with a soft cap, sinks or one sequence
    *also(
        Case(2, 4, 2, 65, 65, 40, HALF),
        Case(2, 17, 1, 65, 1, 16, HALF, splits=True),
        Case(2, 4, 2, 65, 65, 16, HALF, described=True),
        Case(2, 2, 1, 257, 1, 64, FLOAT, small=False, splits=True, mass="some"),
    ),
]
if DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
    CASES = [case for case in CASES if not case.described]


def name(case: Case) -> str:
    way = (
        "-described" * case.described + f"-softcap-{case.softcap}" * (case.softcap is not None) + "-sinks" * case.sinks
    )
    return f"{case.heads}x{case.rows}x{case.keys}x{case.width}-{str(case.dtype)[6:]}-{case.segments}{way}"


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Buffers begin as NaN, those of integers with a block number that does not exist."""

    def poisoned(*size, dtype, device):
        return torch.full(size, torch.nan if dtype.is_floating_point else -(10**6), dtype=dtype, device=device)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(triton_kernel, "_PLANS", {})  # a test chooses its own tiles


def masks(case: Case) -> dict:
    """Segments in runs: 30 is long, seen by none and blind to what is before it, 31 is seen by some. A second
    sequence has random segments and no padding."""
    gen = torch.Generator().manual_seed(3)
    runs = torch.tensor([3, 30, 31, 3, 0], dtype=torch.uint8)
    lengths = torch.tensor([0.1, 0.4, 0.3, 0.1, 0.1]).mul(case.keys).ceil().long()
    segments = runs.repeat_interleave(lengths)[None, : case.keys]
    if case.segments == "own" and case.batch > 1:
        mixed = torch.randint(32, (case.batch - 1, case.keys), generator=gen, dtype=torch.uint8)
        segments = torch.cat([segments, mixed])
    pairs = torch.randint(32, (200, 2), generator=gen).tolist()
    rules = [(30, t) for t in range(32)] + [(3, 30), (31, 3)] + [(s, t) for s, t in pairs if 3 < t < 20]
    if case.segments == "one":  # seen by all: masks are needed at the diagonal and the padding alone
        segments, rules = torch.full((case.batch, case.keys), 31, dtype=torch.uint8), [(31, 0), (0, 31)]
    start = torch.tensor([case.keys // 4 + 3] + [0] * (case.batch - 1), dtype=torch.int32, device=DEVICE)
    given = {"start": start if case.padding else None, "segments": None, "table": None}
    if case.segments != "none":
        given |= {"segments": segments.to(DEVICE), "table": segment_table(rules, DEVICE)}
    return given


def operands(case: Case) -> list[torch.Tensor]:
    """Query, a view of [B, R, H, D]; key and value, the first N of more positions, NaN behind."""
    gen = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=gen).to(case.dtype).to(DEVICE)  # noqa: E731
    query = draw(case.batch, case.rows, case.heads, case.width).transpose(1, 2)
    more = [draw(case.batch, case.kv_heads, case.keys + 70, case.width) for _ in "kv"]
    for tensor in more:
        tensor[:, :, case.keys :] = torch.nan
    return [query, *(tensor[:, :, : case.keys] for tensor in more)]


def chosen_rows(case: Case) -> bool | torch.Tensor:
    """A third of the rows of each sequence, or none; blind rows are among them."""
    if isinstance(case.mass, bool):
        return case.mass
    rows = torch.zeros(case.batch, case.rows, dtype=torch.bool, device=DEVICE)
    if case.mass == "some":
        rows[:, ::3] = True
        rows[-1] &= torch.arange(case.rows, device=DEVICE) > case.rows // 2
    return rows


def unread_blocks(case: Case, seen: torch.Tensor) -> torch.Tensor:
    """Keys of blocks that no row sees, bool [B, N]; blocks as wide as the widest of any kernel."""
    served = triton_kernel._TILES.items()
    kinds = [kind for kind, tiles in served if case.width <= max(tiles[case.dtype.itemsize])]
    kinds += ["described"] * case.described
    widest = max(triton_kernel.config(case.dtype, case.width, (9, 0), kind).block_n for kind in kinds)
    needed = seen.any(1).expand(case.batch, -1)
    padded = F.pad(needed, (0, -case.keys % widest)).unflatten(1, (-1, widest)).any(2)
    return ~padded.repeat_interleave(widest, 1)[:, : case.keys]


def compare(got: torch.Tensor, low: torch.Tensor, truth: torch.Tensor, eps: float) -> None:
    """An error of `eps` of the largest value is allowed on top; -inf stands in the same places."""
    blind = truth == -torch.inf
    assert torch.equal(got == -torch.inf, blind)
    got, low, truth = (t.masked_fill(blind, 0) for t in (got, low, truth))
    magnitude = float(truth.abs().max()) * eps / (4 * torch.finfo(torch.float32).eps)  # of which four roundings
    assert_as_good_as(got, low, truth, magnitude)


def chip_error(query: torch.Tensor, key: torch.Tensor, scale: float) -> float:
    """What a GPU's exponential and three products of tf32 in place of float32's make of a weight."""
    if interpreted():
        return 0.0
    if query.dtype != FLOAT:
        return 2**-22
    key = key.nan_to_num(0).abs().repeat_interleave(query.shape[1] // key.shape[1], 1)
    return 2**-21 * (1 + float((query.abs() @ key.mT).max()) * scale)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_matches_float64_definition(case, monkeypatch):
    if case.small:
        monkeypatch.setattr(triton_kernel, "config", lambda *_: SMALL)
    monkeypatch.setattr(triton_kernel, "chip", lambda _: ((9 if case.described else 8, 0), 4))
    splits = []
    launch = triton_kernel.split_count
    monkeypatch.setattr(triton_kernel, "split_count", lambda *a: splits.append(launch(*a)) or splits[0])
    query, key, value = operands(case)
    given = masks(case)
    seen = visible(case.rows, case.keys, given["segments"], given["table"], given["start"]).to(DEVICE)
    mass = chosen_rows(case)
    scale = case.width**-0.5 if case.scale is None else case.scale
    sinks = torch.linspace(-4, 4, case.heads, device=DEVICE) if case.sinks else None
    arguments = (given["segments"], given["table"], given["start"], scale, True, mass, True, case.softcap, sinks)
    truth = reference(query.double(), key.double(), value.double(), *arguments)
    plain = plain_torch(query, key, value, *arguments)
    if case.softcap is None and not case.sinks:
        own = F.scaled_dot_product_attention(query, key, value, seen[:, None], scale=scale, enable_gqa=True)
    else:
        own = reference(query, key, value, *arguments)[0]

    unread = unread_blocks(case, seen)
    assert unread.any() or case.segments in ("one", "none") or case.keys < 65, "nothing is poisoned"
    for tensor in (key, value):
        tensor.masked_fill_(unread[:, None, :, None], torch.nan)
    given |= {"softcap": case.softcap, "sinks": sinks, "scale": case.scale}
    got = knockout_attention(query, key, value, **given, lse=case.lse, mass=mass, backend="triton")

    assert got.output.dtype == case.dtype
    assert got.output.transpose(1, 2).is_contiguous()
    eps = torch.finfo(torch.float32).eps
    exact = 4 * eps + chip_error(query, key, scale)
    roundings = exact if case.dtype == FLOAT else torch.finfo(case.dtype).eps
    compare(got.output, own.nan_to_num(0), truth[0], roundings)  # torch gives NaN for rows that see nothing
    blind = ~seen.any(2)[:, None, :, None]
    assert (got.output.masked_select(blind) == 0).all()
    assert (got.lse is None, got.mass is None) == (not case.lse, mass is False)
    if got.lse is not None:
        assert got.lse.dtype == torch.float32
        compare(got.lse, plain[1], truth[1], exact)
    if got.mass is not None:
        assert got.mass.dtype == torch.float32
        compare(got.mass, plain[2], truth[2], exact)
    assert (splits[0] > 1) == case.splits, "the case covers what it says"


def tiled(seen: torch.Tensor, fill: bool) -> torch.Tensor:
    """Tiles of 16 x 16 of seen [B, R, N], filled up: [B, row blocks, key blocks, 256]."""
    padded = F.pad(seen, (0, -seen.shape[2] % 16, 0, -seen.shape[1] % 16), value=fill)
    return padded.unflatten(2, (-1, 16)).unflatten(1, (-1, 16)).transpose(2, 3).flatten(3)


@triton.jit
def surveys(out, segments, base, first, last, free, barred, CHUNK: tl.constexpr):  # noqa: N803
    """What a program makes of CHUNK blocks of 16 keys."""
    is_open, is_barred = survey(segments, base, first, last, free, barred, CHUNK, 16)
    tl.store(out, is_open)
    tl.store(out + 1, is_barred)


@triton.jit
def surveys_of_rows(
    out, chosen, segments, table, base, key, last, first, present, rows, keys, CHUNK: tl.constexpr  # noqa: N803
):  # fmt: skip
    """What a program makes of CHUNK blocks of 16 rows."""
    whole, partial = survey_rows(
        chosen, segments, table, base, key, last, first, present, rows, keys, True, True, CHUNK, 16
    )
    tl.store(out, whole)
    tl.store(out + 1, partial)


def places(bits: int) -> list[int]:
    return [i for i in range(32) if bits >> i & 1]


def union(words: torch.Tensor) -> int:
    return functools.reduce(int.__or__, words.tolist(), 0)


PLANNED = [c for c in CASES if c.small and c.segments != "none" and c.heads == c.kv_heads]


@pytest.mark.parametrize("case", PLANNED, ids=name)
def test_only_open_blocks_are_read(case):
    """A program finds the tiles with a pair to see, and those that need no mask; within its share of the blocks alone.
    The mass reads tiles of chosen rows alone."""
    given, mass = masks(case), chosen_rows(case)
    seen = visible(case.rows, case.keys, given["segments"], given["table"], given["start"]).expand(case.batch, -1, -1)
    seen, chunk = seen.cpu(), 4
    chosen = torch.ones(case.batch, case.rows, dtype=torch.bool) if isinstance(mass, bool) else mass.cpu()
    some, every = tiled(seen, False).any(3), tiled(seen, True).all(3)
    counted = seen & chosen[:, :, None]
    some_chosen, every_chosen = tiled(counted, False).any(3), tiled(counted, False).all(3)
    position, words = torch.arange(case.rows) + case.keys - case.rows, given["table"].cpu()
    for b in range(case.batch):
        ids = given["segments"][min(b, len(given["segments"]) - 1)].contiguous()
        first = 0 if given["start"] is None else int(given["start"][b])
        own, picked = ids.cpu().long(), chosen[b].to(DEVICE).view(torch.uint8)

        for block in range(some.shape[1]):
            rows = position[block * 16 : block * 16 + 16]
            entries = words[own[rows[rows >= first]]]
            needed, last = some[b, block].clone(), min(int(rows[-1]), case.keys - 1)
            needed[0] = False  # of another split
            found, barred = [], []
            for base in range(1, some.shape[2], chunk):
                out = torch.zeros(2, dtype=torch.int32, device=DEVICE)
                surveys[(1,)](out, ids, base, first, last, union(~entries), union(entries), CHUNK=chunk)
                found += [base + i for i in places(int(out[0]))]
                barred += [base + i for i in places(int(out[1]))]
            below = (torch.arange(some.shape[2]) + 1) * 16 <= rows[0]
            assert_listed(found, needed, below)
            unmasked = [i for i in found if i not in barred and below[i] and i * 16 >= first]
            assert every[b, block][unmasked].all()
            assert set((every[b, block] & below).nonzero().flatten().tolist()) - {0} <= set(unmasked)
        for block in range(some.shape[2]):
            keys = torch.arange(block * 16, min(block * 16 + 16, case.keys))
            present, whole, partial = union(1 << own[keys[keys >= first]]), [], []
            for base in range(0, some.shape[1], chunk):
                out = torch.zeros(2, dtype=torch.int32, device=DEVICE)
                surveys_of_rows[(1,)](
                    out, picked, ids, given["table"], base, int(keys[0]), int(keys[0]) + 15, first, present, case.rows,
                    case.keys, CHUNK=chunk,
                )  # fmt: skip
                whole += [base + i for i in places(int(out[0]))]
                partial += [base + i for i in places(int(out[1]))]
            assert not set(whole) & set(partial)
            assert_listed(whole + partial, some_chosen[b, :, block], keys[-1] < position[::16])
            assert whole == every_chosen[b, :, block].nonzero().flatten().tolist()


def assert_listed(listed: list[int], needed: torch.Tensor, below: torch.Tensor) -> None:
    """Every needed block is listed, and of those below the diagonal no other."""
    assert set(needed.nonzero().flatten().tolist()) <= set(listed)
    assert sorted(i for i in listed if below[i]) == (needed & below).nonzero().flatten().tolist()


@triton.jit
def first_bits(bits, first, count):
    tl.store(first + tl.program_id(0), first_bit(tl.load(bits + tl.program_id(0))))
    tl.store(count + tl.program_id(0), count_bits(tl.load(bits + tl.program_id(0))))


def test_first_bit_and_how_many():
    """Of every place, alone and with all others above it, and with every second one."""
    made = [word for i in range(32) for word in (1 << i, -1 << i, 0x55555555 << i)]
    bits = torch.tensor([(one + (1 << 31)) % (1 << 32) - (1 << 31) for one in made], dtype=torch.int32, device=DEVICE)
    first, count = (torch.full_like(bits, -1) for _ in range(2))
    first_bits[(len(made),)](bits, first, count)
    assert first.tolist() == [i for i in range(32) for _ in range(3)]
    assert count.tolist() == [(one % (1 << 32)).bit_count() for one in made]


@pytest.mark.parametrize("rows", [1, 40])
def test_all_padding(rows):
    """A sequence of nothing but padding beside one without: zeros, -inf and no mass."""
    query, key, value = (torch.randn(2, 2, n, 16, device=DEVICE) for n in (rows, 40, 40))
    start = torch.tensor([40, 0], dtype=torch.int32, device=DEVICE)
    got = knockout_attention(query, key, value, start=start, lse=True, mass=True, backend="triton")
    assert (got.output[0] == 0).all()
    assert (got.lse[0] == -torch.inf).all()
    assert (got.mass[0] == 0).all()
    torch.testing.assert_close(got.mass[1].sum(-1), torch.ones(2, device=DEVICE))
    assert got.output[1].isfinite().all()
    assert got.lse[1].isfinite().all()


@pytest.mark.parametrize("segments", [False, True])
def test_keys_after_a_block_of_rows_are_not_read(segments):
    """Later rows see them, so that they are poisoned for those alone."""
    query, key, value = (torch.randn(1, 1, 160, 16, device=DEVICE) for _ in range(3))
    masks = {}
    if segments:
        ids = (torch.arange(160, device=DEVICE) > 40).to(torch.uint8)[None]
        masks = {"segments": ids, "table": segment_table([(0, 1)], DEVICE)}
    clean = knockout_attention(query, key, value, **masks, backend="triton").output
    key[:, :, 128:] = value[:, :, 128:] = torch.nan  # 128: a multiple of every tile's rows and keys
    got = knockout_attention(query, key, value, **masks, backend="triton").output
    assert torch.equal(got[:, :, :128], clean[:, :, :128])
    assert got[:, :, 128:].isnan().all()


def test_padding_opens_no_block():
    """Rows of padding may stand in a block with others; what only their segment sees stays unread."""
    query, key, value = (torch.randn(1, 1, 128, 16, device=DEVICE, dtype=BRAIN) for _ in range(3))
    ids = torch.ones(1, 128, dtype=torch.uint8, device=DEVICE)
    ids[:, :10], ids[:, 64:] = 0, 2
    key[:, :, 64:] = value[:, :, 64:] = torch.nan
    start = torch.tensor([10], dtype=torch.int32, device=DEVICE)
    masks = {"segments": ids, "table": segment_table([(2, 1), (2, 2)], DEVICE), "start": start}
    assert knockout_attention(query, key, value, **masks, backend="triton").output.isfinite().all()


@pytest.mark.parametrize("rows", [1, 40])
def test_no_keys(rows):
    """An empty prefix: as rows that see nothing."""
    query, key = torch.randn(2, 2, rows, 16, device=DEVICE), torch.zeros(2, 2, 0, 16, device=DEVICE)
    got = knockout_attention(query, key, key, causal=False, lse=True, backend="triton")
    assert (got.output == 0).all()
    assert (got.lse == -torch.inf).all()


def test_no_rows_and_no_sequences():
    for batch, rows in ((0, 5), (2, 0)):
        query, key = torch.zeros(batch, 2, rows, 16, device=DEVICE), torch.zeros(batch, 2, 20, 16, device=DEVICE)
        got = knockout_attention(query, key, key, lse=True, mass=True, backend="triton")
        assert got.output.shape == (batch, 2, rows, 16)
        assert got.lse.shape == (batch, 2, rows)
        assert got.mass.shape == (batch, 2, 20)
        assert (got.mass == 0).all()


def test_broken_weights_give_nan():
    """NaN in a query must not look like a row that sees nothing."""
    query, key = torch.randn(1, 2, 33, 16, device=DEVICE), torch.randn(1, 2, 33, 16, device=DEVICE)
    query[:, 1, 20] = torch.nan
    got = knockout_attention(query, key, key, lse=True, backend="triton")
    assert got.output[:, 1, 20].isnan().all()
    assert got.lse[:, 1, 20].isnan().all()
    assert got.output.isnan().sum() == 16


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FLOAT])
@pytest.mark.parametrize("rows", [1, 33, 70])
@pytest.mark.parametrize("padding", [False, True])
def test_rows_after_all_keys(rows, padding, dtype):
    """A shared prefix: more rows than keys, each sees every key but padding."""
    case = Case(2, 2, 1, 40, rows, 16, dtype, "none", padding, mass=False)
    query, key, value = operands(case)
    start = masks(case)["start"]
    given = (None, None, start, 0.25, True, False, False)
    got = triton_kernel.attention(query, key, value, *given)
    truth = reference(query.double(), key.double(), value.double(), *given)
    low = reference(query, key, value, *given)
    error = chip_error(query, key, 0.25)
    compare(got[0], low[0], truth[0], torch.finfo(dtype).eps + error)
    compare(got[1], truth[1].float(), truth[1], 8 * torch.finfo(torch.float32).eps + error)
