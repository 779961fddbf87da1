"""The contenders of scores.py as pytest-benchmark cases, one group, behind the same gate:
`pytest benchmarks`. scores.py runs them in turn within one process, which is what README quotes."""

from __future__ import annotations

import pytest
import torch
from scores import Layer, contenders, gate

NAMES = ("direct", "torch, cached", "kernel, cached", "kernel, on the fly")


@pytest.fixture(scope="module")
def runs():
    torch.set_num_threads(2)
    layer = Layer(heads=1)
    found = contenders(layer)
    assert tuple(found) == NAMES
    gate(layer, found)
    return found


@pytest.mark.benchmark(group="position scores of a head, LLaVA-1.5-7B's sizes, float32")
@pytest.mark.parametrize("name", NAMES)
def test_position_scores(benchmark, runs, name):
    benchmark.pedantic(runs[name], args=(0,), rounds=5, warmup_rounds=1)
