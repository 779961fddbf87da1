"""Small writes by moments, large ones by exponentials, in one call of the Triton kernels; run by test_triton.py."""

from __future__ import annotations

import math

import pytest
import torch
from cases_logprob import Given, _poisoned, doubled, draw, plain  # noqa: F401  the fixture is used by its name
from mllm_fast.kernels.logprob_increase import triton_kernel, triton_moments
from mllm_fast.kernels.logprob_increase.operators import with_longest

HALVES = [torch.bfloat16, torch.float16]
SIZES = [(3, 130, 203, 64, None), (2, 157, 403, 40, 3), (7, 33, 150, 16, 2), (1, 256, 193, 128, 1)]


def sized(groups, rows, vocab, depth, dtype, seed=0):
    """Writes of many sizes, from none at all to large ones, in any order."""
    base, writes, *rest = draw(groups, rows, vocab, depth, dtype, "factored", seed=seed)
    exponent = torch.linspace(-24, 0, rows).round()[torch.randperm(rows, generator=torch.Generator().manual_seed(seed))]
    writes = (writes.cpu() * 2 ** exponent[:, None]).to(writes.device)  # by powers of two: still exact in the type
    writes[:, ::7] = 0
    return base, writes, *rest


@pytest.fixture(autouse=True)
def _always(monkeypatch):
    monkeypatch.setattr(triton_moments, "LEAST_WORK", 0)


@pytest.fixture
def lists(monkeypatch):
    """The rows that were left to the exponentials and their counts, (order [G, R], counts [G]) of each launch."""
    found = []
    expanded = triton_kernel._Problem._expanded

    def kept(self, *arguments):
        order, counts = expanded(self, *arguments)
        found.append((order.cpu(), counts.cpu()))
        return order, counts

    monkeypatch.setattr(triton_kernel._Problem, "_expanded", kept)
    return found


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("confident", [False, True])
@pytest.mark.parametrize(("groups", "rows", "vocab", "depth", "splits"), SIZES)
def test_every_row_is_within_its_bound(lists, dtype, groups, rows, vocab, depth, splits, confident):
    """A row that the moments serve errs by c exp(c) s / 6 and what is rounded on the way, a listed one as ever; a row
    whose bound is well within a rounding of sqrt(s) is served, and one whose bound is well beyond it is listed. Where
    the explained word has nearly all of the probability, S is small beside the changes, and so is the error."""
    arguments = sized(groups, rows, vocab, depth, dtype)
    base, writes, _, operators, _, source = arguments
    if confident:
        base.log_probs[torch.arange(len(base.tokens)), base.tokens] += 30
        base.log_probs = torch.log_softmax(base.log_probs, -1)
    got = triton_kernel.increase(*arguments, splits=splits).cpu().double()
    truth = plain(doubled(*arguments)).cpu()
    truth = truth - truth[:, :1]  # a write of zeros: float32's probabilities sum up to nearly 1
    matrices, sizes = (torch.stack(list(operators)).double().cpu(), writes.double().cpu())
    chances = base.log_probs.double().exp().cpu()[source.cpu()][:, None]
    d = sizes @ matrices.mT
    mean = (chances * d).sum(-1)
    spread = (chances * (d - mean[..., None]).square()).sum(-1)
    explained = matrices[torch.arange(groups), base.tokens[source].cpu()][:, None]
    centred = sizes @ (matrices - explained).mT  # of the explained word, as the moments are
    c = sizes.norm(dim=-1) * matrices.norm(dim=-1).amax(-1)[:, None] + mean.abs()
    bound = c * c.exp() * spread / 6
    unit = torch.finfo(dtype).eps / 2
    ((order, counts),) = lists
    done = torch.ones(groups, rows, dtype=torch.bool)
    for group, count in enumerate(counts):
        left = order[group, :count].long()
        assert (left.diff() > 0).all()
        done[group, left] = False
    raw = (chances * centred * d).sum(-1).abs()
    deviation = (spread + 4 * unit * raw).sqrt()
    nothing = writes.cpu().abs().amax(-1) == 0
    assert done[(c * c.exp() * deviation < 0.9 * 6 * unit) | nothing].all()
    told = spread > 2**-24  # float16 has no digits for what is less likely; it moves S by less than float32's rounding
    assert not done[(c * c.exp() * deviation > 1.1 * 6 * unit) & told].any()
    assert 0.2 < done.double().mean() < 0.99, "both ways must be taken"
    error = (got - truth).abs()
    low = plain(arguments).cpu().double()
    allowed = 2 * (low - truth).abs().max() + 4 * torch.finfo(torch.float32).eps * 20
    assert (error[~done] <= allowed).all()
    # Each p (M - M_b) is rounded three times, as a number independent of the others: six times the deviation of their
    # sum. The second moment has some roundings more; float16 loses what has next to no probability.
    products = (chances * (sizes.abs() @ (matrices - explained).abs().mT)).sum(-1)
    deviations = (chances.square() * (sizes.square() @ (matrices - explained).square().mT)).sum(-1).sqrt()
    made = 6 * unit * deviations + 4 * unit * raw + 2**-22 * products
    assert (error <= bound + made + 1e-9)[done].all()
    assert (got[:, ::7] == 0).all()
    assert not confident or made[done].max() < 0.01 * unit * c[done].max()


def test_writes_that_are_all_small_or_all_large(lists):
    small = draw(3, 70, 193, 32, torch.bfloat16, "factored")
    small[1].mul_(2.0**-12)
    large = draw(3, 70, 193, 32, torch.bfloat16, "factored")
    for arguments in (small, large):
        truth = plain(doubled(*arguments))
        got = triton_kernel.increase(*arguments)
        assert (got - truth).abs().max() <= 2**-8 * truth.abs().max()
    assert [counts.tolist() for _, counts in lists] == [[0] * 3, [70] * 3]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_cannot_be_bounded_is_not_expanded(lists):
    """A word of next to no probability but a huge operator may change a lot; NaN stays NaN."""
    base, writes, gain, operators, shift, _ = draw(3, 70, 193, 32, torch.bfloat16, "factored")
    writes.mul_(2.0**-12)
    base.tokens[0] = 5
    base.log_probs[0, 7], base.log_probs[0, 9] = -300.0, -math.inf
    base.log_probs[:] = torch.log_softmax(base.log_probs, -1)
    operators[0][7] *= 2.0**22
    operators[2][11] = math.nan
    operators = Given(with_longest(one.float(), torch.bfloat16) for one in operators)
    arguments = base, writes, gain, operators, shift, torch.zeros(3, dtype=torch.int64, device=writes.device)
    got, truth = triton_kernel.increase(*arguments), plain(doubled(*arguments))
    assert lists[0][1].tolist() == [70, 0, 70]
    assert truth[0].min() < -50, "the unlikely word must matter"
    torch.testing.assert_close(got[0].double(), truth[0], rtol=1e-5, atol=1e-5)
    assert (got[1] - truth[1]).abs().max() <= 2**-8 * truth[1].abs().max()
    assert got[2].isnan().all()


def test_only_where_it_pays_and_where_rounding_leaves_room(monkeypatch):
    monkeypatch.undo()
    assert triton_moments.serves(torch.bfloat16, 128, 1024, 576, 32_064)
    assert not triton_moments.serves(torch.float32, 128, 1024, 576, 32_064)
    assert not triton_moments.serves(torch.bfloat16, 128, 1024, 255, 32_064)
    assert not triton_moments.serves(torch.bfloat16, 256, 1024, 5000, 32_064)
    assert not triton_moments.serves(torch.bfloat16, 36, 1024, 5000, 32_064)
    assert not triton_moments.serves(torch.bfloat16, 16, 10, 80, 56)
