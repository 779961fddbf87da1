"""The comparison of maps: its measures by hand, and one image all the way through."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics

import mllm_fast as mf
from mllm_fast.evaluation.memory import peak_tensor_bytes
from mllm_fast.evaluation.samples import scenes
from mllm_fast.evaluation.studies import fidelity
from mllm_fast.evaluation.studies.fidelity import SHARES, Fidelity, area, curves, rank_correlation
from mllm_fast.explain.registry import methods_without_detector

METHODS = methods_without_detector()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-3, 3)), min_size=2, max_size=30))
def test_rank_correlation_is_scipys(pairs):
    a, b = (np.array(values, float) for values in zip(*pairs, strict=True))
    found = rank_correlation(a, b)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert found is None
    else:
        assert found == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_curves_by_hand(monkeypatch):
    """A word whose probability is the sum of what its patches are worth."""
    positions = torch.arange(10, 20)
    worth = dict(zip(positions.tolist(), [0.4, 0.3, 0.1, 0.1, 0.05, 0.05, 0, 0, 0, 0], strict=True))

    def log_probs(ex, token, variants):
        left = [sum(worth.values()) - sum(worth[p] for p in gone.tolist()) for gone in variants]
        return torch.tensor(left, dtype=torch.float64).clamp_min(1e-30).log()

    monkeypatch.setattr(fidelity, "log_probs", log_probs)
    ex = SimpleNamespace(layout=SimpleNamespace(images=[SimpleNamespace(positions=positions)]))
    best, worst = torch.arange(10.0).flip(0), torch.tensor([0.0] * 6 + [1.0] * 4)
    deletion, insertion = curves(ex, 0, {"best": best, "worst": worst})
    # counts: 0, 1, 1, 1, 2, 3, 5, 8, 10 of 10
    assert deletion["best"] == pytest.approx([1, 0.6, 0.6, 0.6, 0.3, 0.2, 0.05, 0, 0])
    assert insertion["best"] == pytest.approx([0, 0.4, 0.4, 0.4, 0.7, 0.8, 0.95, 1, 1])
    assert deletion["worst"] == pytest.approx([1, 1, 1, 1, 1, 1, 0.6, 0.1, 0])  # ties by position: 0.4 first
    assert insertion["worst"] == pytest.approx([0, 0, 0, 0, 0, 0, 0.4, 0.9, 1])
    assert area([1.0] * len(SHARES)) == pytest.approx(1)
    assert area(list(SHARES)) == pytest.approx(0.5)
    curve = np.random.default_rng(0).random(len(SHARES)).tolist()
    assert area(curve) == pytest.approx(metrics.auc(SHARES, curve))


def test_bytes_alive_at_once():
    given_before = torch.zeros(1000)

    def run():
        one = torch.zeros(1000)  # 4,000 bytes
        two = one + 1
        del one
        three = two.double()[5:]  # 8,000 more; views are no bytes of their own
        two.add_(given_before[:].mul_(2))  # what was there before does not count
        return three.sum()

    # two and three at the end, and the sum's 8 bytes
    assert peak_tensor_bytes(run) == 4000 + 8000 + 8
    weight = torch.ones(100, 100, requires_grad=True)
    forward = peak_tensor_bytes(lambda: (weight * 2).square().sum())
    assert peak_tensor_bytes(lambda: (weight * 2).square().sum().backward()) > forward


def row(method, hit, deletion, rank):
    curve = [deletion] * len(SHARES)
    seconds = {"seconds": 0.002, "megabytes": 1.5 if hit else None}
    return {"method": method, "hit": hit, "deletion": curve, "insertion": curve, "rank": rank, **seconds}


def test_the_report_by_hand():
    words = [(True, 0.2, 0.5), (False, 0.4, None), (True, 0.6, 0.7)]
    rows = {f"image {i}": [row(method, *word) for method in METHODS] for i, word in enumerate(words)}
    report = Fidelity().report({**rows, "empty": [], "gone": [{"error": "no such file"}]})
    found = report.figures["methods"]["tam"]
    assert report.figures["words"] == 3
    assert found["hit"] == (pytest.approx(2 / 3), pytest.approx(math.sqrt(1 / 3) / math.sqrt(3)))
    assert found["deletion"][0] == pytest.approx(0.4)
    assert found["rank"][0] == pytest.approx(0.6)
    assert (found["seconds"], found["megabytes"]) == (0.002, 1.5)
    assert report.failed == {"gone": "no such file"}
    assert len(report.charts[0].png()) > 10_000
    assert Fidelity().report({"empty": []}).says == ["No word named an object of its image."]


def test_a_picture():
    """The embedded model on one scene: the ends of the curves are the word as it is and without the image."""
    vlm, sample = mf.VLM.from_pretrained("shapes"), scenes(1).list[0]
    rows = Fidelity().rows(vlm, sample)
    assert len(rows) % len(METHODS) == 0
    token = rows[0]["token"]
    assert [one["method"] for one in rows if one["token"] == token] == list(METHODS)
    ex = vlm.explain(sample.image, "Describe the image.", max_new_tokens=64)
    without = vlm.explain(
        sample.image, "Describe the image.", ex.text, knockout=mf.Knockout("image", "query+generated")
    )
    final = without.trace.final[token]
    with torch.no_grad():
        logits = vlm.text.logits(vlm.text.norm(final))
    expected = float(torch.softmax(logits, -1)[ex.token_ids[token]])
    by = {one["method"]: one for one in rows if one["token"] == token}
    for one in by.values():
        assert one["deletion"][-1] == one["insertion"][0] == pytest.approx(expected, rel=1e-3)
        assert one["deletion"][0] == one["insertion"][-1] > 0.5
    assert by["relevancy"]["megabytes"] > by["rollout"]["megabytes"] > by["attention"]["megabytes"] > 0
    assert by["exhaustive"]["rank"] == pytest.approx(1)
    assert by["logprob"]["hit"]
