"""The definition of topk_compaction against a search by hand, and its errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mllm_fast.kernels import Compaction, topk_compaction

MASSES = st.sampled_from([0.0, -0.0, 0.25, 0.5, 1.0, math.inf, -math.inf, math.nan])


def by_hand(mass: list[float], keep: int, candidates: list[bool], always: list[bool]) -> list[int]:
    left = [i for i, candidate in enumerate(candidates) if candidate]
    kept = [i for i, one in enumerate(always) if one]
    for _ in range(keep):
        best = left[0]
        for i in left[1:]:
            known = -math.inf if math.isnan(mass[best]) else mass[best]
            if not math.isnan(mass[i]) and mass[i] > known:
                best = i
        left.remove(best)
        kept.append(best)
    return sorted(kept)


@st.composite
def problems(draw):
    layers, positions = draw(st.integers(1, 3)), draw(st.integers(0, 12))
    mass = draw(st.lists(st.lists(MASSES, min_size=positions, max_size=positions), min_size=layers, max_size=layers))
    kinds = draw(st.lists(st.sampled_from("cca."), min_size=positions, max_size=positions))
    candidates, always = [kind == "c" for kind in kinds], [kind == "a" for kind in kinds]
    keep = draw(st.sampled_from([0, sum(candidates)]) | st.integers(0, sum(candidates)))
    return mass, candidates, always, keep


@settings(max_examples=200)
@given(problem=problems())
def test_matches_a_search_by_hand(problem):
    mass, candidates, always, keep = problem
    layers, positions = len(mass), len(candidates)
    keys, values = torch.randn(2, layers, 2, positions, 3).unbind()
    got = topk_compaction(
        torch.tensor(mass).reshape(layers, positions),
        list(keys),
        list(values),
        keep=keep,
        candidates=torch.tensor(candidates, dtype=torch.bool),
        always=torch.tensor(always, dtype=torch.bool),
    )
    assert isinstance(got, Compaction)
    for layer in range(layers):
        expected = by_hand(mass[layer], keep, candidates, always)
        assert got.positions[layer].tolist() == expected
        assert torch.equal(got.keys[layer], keys[layer][:, expected])
        assert torch.equal(got.values[layer], values[layer][:, expected])


def good() -> dict:
    return {
        "mass": torch.rand(2, 6),
        "keys": [torch.randn(1, 6, 4) for _ in range(2)],
        "values": [torch.randn(1, 6, 4) for _ in range(2)],
        "keep": 2,
        "candidates": torch.tensor([True] * 4 + [False] * 2),
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_type(dtype):
    problem = good() | {name: [t.to(dtype) for t in good()[name]] for name in ("keys", "values")}
    assert topk_compaction(**problem).keys.dtype == dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mass": torch.rand(2, 6).double()}, "mass is float32"),
        ({"mass": torch.rand(6)}, "mass is float32"),
        ({"mass": torch.rand(0, 6), "keys": [], "values": []}, "L >= 1"),
        ({"keys": [torch.randn(1, 6, 4)]}, "keys has one tensor a layer, 2, got 1"),
        ({"values": [torch.randn(1, 5, 4)] * 2}, r"values\[0\] is \[Hkv, 6, D\], got \[1, 5, 4\]"),
        ({"values": [torch.randn(1, 6, 3)] * 2}, r"values\[0\] is \[1, 6, 4\] as keys\[0\] is"),
        ({"values": [torch.randn(1, 6, 4).half()] * 2}, "of keys\\[0\\]'s type, got torch.float16"),
        ({"keys": [torch.ones(1, 6, 4).long()] * 2}, "floating"),
        ({"keys": [torch.randn(1, 4, 6).mT] * 2}, r"keys\[0\]'s last dimension has stride 1, got 6"),
        ({"keys": [torch.randn(1, 6, 4, device="meta")] * 2}, r"keys\[0\] is on meta"),
        ({"keep": -1}, "keep is 0 to the number of candidates, 4, got -1"),
        ({"keep": 5}, "keep is 0 to the number of candidates, 4, got 5"),
        ({"keep": 1.5}, "keep is 0 to"),
        ({"candidates": torch.ones(6)}, "candidates is bool"),
        ({"candidates": torch.ones(5, dtype=torch.bool)}, "candidates is bool"),
        ({"always": torch.ones(6, 1, dtype=torch.bool)}, "always is bool"),
        ({"always": torch.ones(6, dtype=torch.bool)}, "always has no position that is a candidate, got 4"),
        ({"backend": "cpu"}, "no kernel of that kind"),
        ({"backend": "gpu"}, "backend is one of"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        topk_compaction(**(good() | change))
