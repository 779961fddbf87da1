"""The increases of one token in two calls, against float64 and against `logprob_increase`."""

import pytest
import torch
from mllm_fast.kernels import Unembedding, logprob_increase
from mllm_fast.kernels.extension import cpu_extension
from mllm_fast.kernels.token_scores import TokenScorer, scorable

from mllm_fast.explain import write_scores
from mllm_fast.explain.token_scorer import token_scorer

EXTENSION, _ = cpu_extension()
pytestmark = pytest.mark.skipif(EXTENSION is None, reason="the C++ extension is not built")
ISAS = EXTENSION.instruction_sets() if EXTENSION is not None else []


def problem(layers, heads, width, hidden, vocab, count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    unembedding = Unembedding(rand(vocab, hidden) / hidden**0.5, 1 + rand(hidden) / 4, eps=1e-5)
    projections = [rand(hidden, heads * width) / (heads * width) ** 0.5 for _ in range(layers)]
    rows = rand(layers, hidden), rand(layers, heads, width), 3 * rand(hidden)
    values = rand(5, count, width) / count
    which = [(layer % layers, head % heads) for layer, head in ((0, 0), (1, 1), (2, 1), (0, 2), (1, 0))]
    return unembedding, projections, rows, which, values


def exact(unembedding, projections, rows, token, which, values, dtype=torch.float64):
    """Scores of heads and positions by `logprob_increase` in plain torch."""
    residual, output, final = (one.to(dtype) for one in rows)
    wide = Unembedding(unembedding.weight.to(dtype), unembedding.gain.to(dtype), eps=unembedding.eps)
    layers, heads, width = output.shape
    each = [one.to(dtype).unflatten(1, (heads, width)).transpose(0, 1) for one in projections]
    both = [(layer, head) for layer in range(layers) for head in range(heads)]

    def scored(pairs, writes):
        return logprob_increase(
            residual[[layer for layer, _ in pairs]],
            writes,
            torch.full((len(pairs),), token),
            wide,
            projection=torch.stack([each[layer][head] for layer, head in pairs]),
            final=final.expand(len(pairs), -1),
            way="factored",
            backend="torch",
        )

    of_heads = scored(both, output.flatten(0, 1)[:, None]).view(layers, heads)
    return of_heads, scored(which, values.to(dtype))


CASES = [(3, 4, 32, 128, 56, 150), (2, 3, 16, 48, 97, 7), (1, 5, 40, 64, 300, 1), (4, 8, 64, 256, 129, 33)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES)
def test_equals_float64(case, isa):
    unembedding, projections, rows, which, values = problem(*case)
    for token in (0, case[4] - 1):
        wanted = exact(unembedding, projections, rows, token, which, values)
        single = exact(unembedding, projections, rows, token, which, values, torch.float32)
        scorer = TokenScorer(unembedding, projections, case[1], isa)
        heads, logs = scorer.score_heads(*rows, token)
        found = heads, scorer.score_positions(logs, rows[2], token, which, values)
        for mine, theirs, right in zip(found, single, wanted, strict=True):
            error, own_error = (float((one.double() - right).abs().max()) for one in (mine, theirs))
            assert error <= 4 * max(own_error, 2e-6), (error, own_error)


def test_words_that_cannot_be_said():
    """A word whose logit is minus infinity has no share in any sum; NaN stays."""
    unembedding, projections, rows, _, values = problem(*CASES[0])
    weight = unembedding.weight.clone()
    weight[5] = -1e30 * rows[2].sign() * unembedding.gain.sign()
    dead = Unembedding(weight, unembedding.gain, eps=unembedding.eps)
    fixed = rows[2].expand(3, -1).contiguous(), rows[1], rows[2]
    still = [torch.zeros_like(one) for one in projections]
    heads, logs = TokenScorer(dead, still, 4).score_heads(*fixed, 0)
    assert heads.abs().max() < 1e-6
    assert logs.isfinite().all()
    broken = rows[0].clone()
    broken[1, 3] = torch.nan
    scorer = TokenScorer(unembedding, projections, 4)
    heads, logs = scorer.score_heads(broken, *rows[1:], 0)
    assert heads.isnan().any(1).tolist() == [False, True, False]
    assert scorer.score_positions(logs, rows[2], 0, [(1, 0)], values[:1]).isnan().all()


def test_what_it_serves():
    unembedding, projections, rows, which, values = problem(*CASES[0])
    assert scorable(unembedding, projections, 4)
    for changed in (
        {"kind": "layer"},
        {"softcap": 30.0},
        {"bias": torch.zeros(56)},
        {"gain": None},
        {"weight": unembedding.weight.double()},
        {"weight": unembedding.weight.T.contiguous().T},
    ):
        given = {"weight": unembedding.weight, "gain": unembedding.gain, "eps": 1e-5} | changed
        assert not scorable(Unembedding(**given), projections, 4)
    assert not scorable(unembedding, [projections[0], projections[1][:, :96]], 4)
    with pytest.raises(ValueError, match="use logprob_increase"):
        TokenScorer(Unembedding(unembedding.weight), projections, 4)
    scorer = TokenScorer(unembedding, projections, 4)
    with pytest.raises(ValueError, match=r"token lies in 0 \.\. 55, got 56"):
        scorer.score_heads(*rows, 56)
    with pytest.raises(ValueError, match=r"output is float32 \[3, 4, 32\]"):
        scorer.score_heads(rows[0], rows[1][:2], rows[2], 0)
    _, logs = scorer.score_heads(*rows, 0)
    with pytest.raises(ValueError, match=r"heads lie in 0 \.\. 2, 0 \.\. 3"):
        scorer.score_positions(logs, rows[2], 0, [(3, 0)], values[:1])
    with pytest.raises(ValueError, match=r"values is float32 \[5, N, 32\]"):
        scorer.score_positions(logs, rows[2], 0, which, values[:, :, :16])


def test_a_streams_scores_are_those_of_the_other_way(shapes, picture, monkeypatch):
    """And the weights are read again when they change."""

    def stream():
        steps = shapes.stream(picture, "Describe the image.", explain=True, max_new_tokens=6)
        return [(one.head_scores, one.position_scores([(5, 1), (2, 3)]), one.heatmap()) for one in steps]

    def assert_near(mine, others):
        for one, other in zip(mine, others, strict=True):
            for found, wanted in zip(one[:2], other[:2], strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=3e-5)

    fast = stream()
    assert token_scorer(shapes.text, shapes.text.unembedding()) is not None
    output = shapes.text.outputs[2].weight
    with torch.no_grad():
        output.mul_(1.5)
    try:
        changed = stream()
        with monkeypatch.context() as patch:
            patch.setattr(write_scores, "_SMALL", 0)
            assert_near(changed, stream())
    finally:
        with torch.no_grad():
            output.div_(1.5)
    monkeypatch.setattr(write_scores, "_SMALL", 0)
    assert_near(fast, stream())
