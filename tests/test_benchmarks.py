"""benchmarks/gpu.py without a GPU: it rehearses, refuses figures, and turns times into rates as it says."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
A_TIME = re.compile(r"(^|_)(ms|s|seconds|tflops)$|per_s$|^over_|^of_|^times_|_scaled$")


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def keys(value) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*map(keys, value.values()))
    return set().union(*map(keys, value)) if isinstance(value, list) else set()


def test_rehearsal_runs_everything_and_holds_no_times():
    done = run("--rehearse")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["rehearsal"] is True
    assert all(result[name] for name in ("prefill", "decode", "by-products", "scoring", "compaction"))
    assert not result["rates"]
    assert not {key for key in keys(result) if A_TIME.search(key)}
    without = {one["contender"]: one["reason"] for one in result["left_out"]}
    assert {"SDPA, causal, flash", "SDPA, causal, cuDNN", "FlexAttention, default", "ours, graph"} <= without.keys()
    assert set(without.values()) == {"it needs CUDA"}
    for name in without:
        assert f"{name}: left out" in done.stdout


def test_rehearsal_writes_no_figures(tmp_path):
    done = run("--rehearse", "--out", str(tmp_path / "figures.json"))
    assert done.returncode == 2
    assert "--out" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_and_code_2():
    done = run()
    assert done.returncode == 2
    assert len((done.stdout + done.stderr).splitlines()) == 1
    assert "CUDA" in done.stderr


@pytest.fixture
def modules(monkeypatch):
    """gpu, gpu_attention, gpu_measure; nothing is compiled, and the true sizes are tiny."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("gpu", "gpu_attention", "gpu_measure", "gpu_model")
    gpu, attention, measure, model = map(importlib.import_module, names)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for name in ("HEADS", "LENGTHS", "DEPTH"):
        monkeypatch.setattr(attention, name, getattr(attention, f"TINY_{name}"))
    monkeypatch.setattr(gpu, "MODEL", gpu.TINY_MODEL)
    monkeypatch.setattr(gpu, "CACHE", gpu.TINY_CACHE)
    monkeypatch.setattr(model, "SIZES", model.TINY)
    attention.compiled_flex.cache_clear()
    yield gpu, attention, measure
    attention.compiled_flex.cache_clear()


@pytest.fixture
def bench(modules, monkeypatch, tmp_path):
    """Believes that it has a GPU: 2 ms for ours, 4 ms for any other."""
    _, _, measure = modules
    bench = measure.Bench(rehearsal=True, quick=False, rounds=20, folder=str(tmp_path))
    bench.rehearsal = False
    bench.rates = {"bf16_tflops": 1e-3, "float32_tflops": 1e-3, "copy_gb_per_s": 1e-2}

    def times(runs, queued=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # FlexAttention, not compiled
            for one in runs.values():
                one()
        return {name: 2.0 if name in ("ours", "factored") else 4.0 for name in runs}

    monkeypatch.setattr(bench, "times", times)
    monkeypatch.setattr(bench, "synchronize", lambda: None)
    return bench


def test_what_was_measured_is_kept_after_each_section(modules, tmp_path):
    gpu, _, measure = modules
    kept = []
    bench = measure.Bench(rehearsal=True, quick=False, rounds=20, folder=str(tmp_path))
    result = gpu.measure(bench, ["by-products", "compaction", "scoring"], kept.append)
    assert [one.pop("unfinished") for one in kept] == [["compaction", "scoring"], ["scoring"]]
    assert kept[0]["by-products"] == kept[1]["by-products"] == result["by-products"]
    assert result.keys() - kept[-1].keys() == {"scoring"}


def test_rates_are_over_the_pairs_and_bytes_left_open(modules, bench, capsys):
    gpu, _, _ = modules
    found = {}
    for name, section in gpu.SECTIONS.items():
        one = section()
        one.gate(bench)
        found[name] = one.measure(bench)
    for row in found["prefill"] + found["decode"]:
        n, rows = row["positions"], row["positions"] if row in found["prefill"] else 1
        image, after = row["image"], min(rows, row["positions"] - row["image"] - 5)
        pairs = (n * (n + 1) // 2 if rows > 1 else n) - (image * after if row["computes"] != "causal" else 0)
        work = 4 * row["heads"] * row["depth"] * pairs if rows > 1 else 2 * row["kv_heads"] * row["depth"] * pairs * 2
        rate = row["tflops"] * 1e9 if rows > 1 else row["gb_per_s"] * 1e6
        assert rate == pytest.approx(row["batch"] * work / row["ms"])
        assert row["over_ours"] == row["ms"] / 2
    names = {row["contender"] for row in found["prefill"]}
    assert {"FlexAttention, default", "FlexAttention, dynamic=False", "SDPA, causal, flash"} <= names
    assert any("graph" in name for name, _ in bench.left_out)  # a CPU captures none, and it is said
    (scored,) = found["scoring"]
    assert scored["times_faster"] == 4.0 / min(16, scored["heads"]) * scored["heads"] / 2.0
    ours, _ = found["compaction"]
    moved = 2 * 2 * 2 * ours["layers"] * ours["kv_heads"] * ours["kept"] * ours["depth"]
    assert ours["gb_per_s"] * 1e6 * ours["ms"] == pytest.approx(moved)
    assert "first calls" in capsys.readouterr().out


@pytest.mark.parametrize("factor", [1.1, torch.nan])
def test_no_figures_for_a_wrong_contender(modules, bench, monkeypatch, factor):
    _, attention, _ = modules
    right = attention.knockout_attention

    def wrong(*arguments, **options):
        found = right(*arguments, **options)
        return found._replace(output=found.output * factor)

    monkeypatch.setattr(attention, "knockout_attention", wrong)
    with pytest.raises(SystemExit, match="ours: error"):
        attention.Prefill().gate(bench)


@pytest.mark.parametrize("queued", [True, False])
def test_times_are_medians_in_turn_after_a_flush(modules, monkeypatch, tmp_path, queued):
    _, _, measure = modules
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return float(log.count("event"))

    class Flush:
        def zero_(self):
            log.append("flush")

    bench = measure.Bench(rehearsal=True, quick=False, rounds=21, folder=str(tmp_path))
    bench.rehearsal, bench._flush = False, Flush()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    found = bench.times({name: lambda name=name: log.append(name) for name in ("a", "b")}, queued)
    each = ["flush"] * measure.FLUSHES + ([] if queued else ["wait"]) + ["event"]
    assert log == ([*each, "a", "event", *each, "b", "event"]) * (measure.WARM_UP + 21)
    middle = 4 * (measure.WARM_UP + 10)
    assert found == {"a": middle + 2.0, "b": middle + 4.0}
