"""The choice of paths by measurement: what is chosen from given times, what is kept, and that each path computes."""

from __future__ import annotations

import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mllm_fast.kernels import dispatch, knockout_attention, paths, segment_table, tuning
from mllm_fast.kernels.extension import cpu_extension
from mllm_fast.kernels.knockout_attention import reference, sdpa
from mllm_fast.kernels.skinny_linear import cpu_kernel as linear_kernel
from mllm_fast.kernels.skinny_linear import skinny_linear
from mllm_fast.kernels.tuning import timing, uses

EXTENSION = cpu_extension()[0]
needs_extension = pytest.mark.skipif(EXTENSION is None, reason="the C++ extension is not built")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache of its own, in which a calibration may be kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MLLM_FAST_TUNING", raising=False)
    dispatch.forget()
    yield tmp_path
    paths.hold(None)
    monkeypatch.undo()
    dispatch.forget()


def measured(**changes: str) -> paths.Paths:
    usual = paths.table(EXTENSION.instruction_sets(), "")
    return paths.Paths(usual.path | changes, {"float32": (3, 9), "bfloat16": (1, 0)}, "measured")


@given(st.dictionaries(st.sampled_from("abcd"), st.floats(1e-6, 1e-2), min_size=1), st.sampled_from("abcd"), st.data())
def test_no_path_is_chosen_that_is_clearly_slower(seconds, usual, data):
    chosen = timing.fastest(seconds, usual)
    assert seconds[chosen] <= 1.05 * min(seconds.values())
    if usual in seconds and seconds[usual] <= timing.CLEARLY * min(seconds.values()):
        assert chosen == usual


@given(st.dictionaries(st.sampled_from(uses.ROWS), st.tuples(st.floats(1e-3, 1), st.floats(1e-3, 1)), min_size=1))
def test_no_number_of_rows_is_served_that_torch_computes_clearly_faster(seconds):
    least, most = timing.rows_served(seconds, (1, 64))
    for rows, (ours, theirs) in seconds.items():
        if least <= rows <= most:
            assert ours <= 1.05 * theirs
    if all(ours < theirs / 1.05 for ours, theirs in seconds.values()):
        assert (least, most) == (min(seconds), max(seconds))


@pytest.mark.parametrize(
    ("seconds", "served"),
    [
        ({1: (2, 1), 2: (2, 1), 4: (1, 2), 8: (1, 2)}, (4, 8)),  # a Xeon
        ({1: (1, 2), 2: (1, 2), 4: (2, 1), 8: (2, 1)}, (1, 3)),
        ({1: (2, 1), 2: (1, 2), 4: (2, 1), 8: (1, 2), 16: (1, 2)}, (8, 16)),
        ({1: (2, 1), 2: (2, 1)}, (1, 0)),
    ],
)
def test_rows_served(seconds, served):
    assert timing.rows_served(seconds, (1, 64)) == served


def test_slow_contenders_are_left_out_after_a_few_rounds():
    now, calls = [0.0], dict.fromkeys("abc", 0)

    def run(name, seconds):
        calls[name] += 1
        now[0] += seconds

    cost = {"a": 1.0, "b": 1.5, "c": 9.0}
    runs = {name: (lambda name=name: run(name, cost[name])) for name in cost}
    assert timing.in_turn(runs, 50.0, lambda: now[0]) == cost
    assert calls["c"] == 3
    assert calls["a"] == calls["b"] > 3
    assert now[0] <= 50 + 2.5


def test_table_knows_makers():
    intel = paths.table(["avx512_bf16", "avx512", "avx2", "plain"], "Intel(R) Xeon(R)")
    assert intel.path["knockout_attention/prefill/bfloat16"] == "avx512"
    assert intel.rows["float32"][0] == 3
    amd = paths.table(["avx512_bf16", "avx512", "avx2", "plain"], "AMD EPYC")
    assert amd.path["knockout_attention/prefill/bfloat16"] == "avx512_bf16"
    assert amd.rows["float32"][0] == 1


@needs_extension
def test_calibration_is_kept_and_used(own_cache):
    found = tuning.tune(0.3)
    assert found.source == "measured"
    assert set(found.path) == set(paths.USES)
    known = {*EXTENSION.instruction_sets(), "torch"}
    for use, chosen in found.path.items():
        assert chosen in known
        each = {path: took for path, took in found.seconds[use].items() if "rows" not in path}
        assert each[chosen] <= 1.05 * min(each.values())
    dispatch.forget()
    assert paths.paths() == found
    assert [one.name for one in (own_cache / "mllm-fast").iterdir()] == [paths.cache_file().name]
    before = paths.cache_file().read_bytes()
    tuning.ready()
    assert paths.cache_file().read_bytes() == before, "a machine is measured once"


@needs_extension
def test_ready_measures_once_and_only_where_it_is_kept(own_cache, monkeypatch):
    calls = []
    monkeypatch.setattr(tuning, "_tune", lambda *_, **__: calls.append(1))
    tuning.ready()
    assert calls == [1]
    monkeypatch.setattr(paths, "writable", lambda folder: False)
    tuning.ready()
    assert calls == [1], "a machine without a cache would be measured by each process"
    monkeypatch.undo()
    monkeypatch.setenv("MLLM_FAST_TUNING", "off")
    dispatch.forget()
    tuning.ready()
    assert paths.paths().source == "table"


@needs_extension
@pytest.mark.parametrize("content", ["", "{", "[]", '{"path": {}}', "{}", "null", '"x"'])
def test_broken_cache_is_no_calibration(own_cache, content):
    paths.write_measured(measured(), replace=True)
    assert paths.read_measured() is not None
    paths.cache_file().write_text(content)
    dispatch.forget()
    assert paths.paths().source == "table"


@needs_extension
def test_path_of_another_processor_is_not_used(own_cache):
    paths.write_measured(measured(**{"token_scores/all/float32": "avx1024"}), replace=True)
    assert paths.read_measured() is None


@needs_extension
def test_first_of_several_processes_decides(own_cache):
    first, second = measured(), measured(**{"token_scores/all/float32": "plain"})
    paths.write_measured(first, replace=False)
    paths.write_measured(second, replace=False)
    assert paths.read_measured() == first
    paths.write_measured(second, replace=True)
    assert paths.read_measured() == second
    assert len(os.listdir(own_cache / "mllm-fast")) == 1


@needs_extension
def test_choices_are_followed(own_cache, monkeypatch):
    used = []
    real = linear_kernel.linear
    monkeypatch.setattr(linear_kernel, "linear", lambda *a, **k: used.append(len(a[0])) or real(*a, **k))
    torchs = {"knockout_attention/few rows/float32": "torch", "logprob_increase/all/float32": "torch"}
    paths.hold(measured(**torchs))
    dispatch.forget()
    weight = torch.randn(512, 256)
    for rows in (2, 3, 9, 10):
        skinny_linear(torch.randn(rows, 256), weight)
    assert used == [3, 9]
    cpu = torch.device("cpu")
    assert dispatch.choose(cpu, torch.float32, op="logprob_increase") == "torch"
    assert dispatch.choose(cpu, torch.float32, "cpu", op="logprob_increase") == "cpu"
    assert dispatch.choose(cpu, torch.bfloat16, op="logprob_increase") == "cpu"
    calls = []
    real_sdpa = sdpa.attention
    monkeypatch.setattr(sdpa, "attention", lambda *a, **k: calls.append(1) or real_sdpa(*a, **k))
    q, k = torch.randn(1, 2, 4, 16), torch.randn(1, 2, 40, 16)
    knockout_attention(q, k, k)
    knockout_attention(q, k, k, lse=True)  # beyond it
    knockout_attention(q, k, k, backend="cpu")  # a kernel that is named is never replaced
    knockout_attention(k, k, k)
    assert calls == [1]
    assert "torch" in dispatch.backend_report()["knockout_attention"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(
    rows=st.integers(1, 20), more=st.integers(0, 20), grouped=st.booleans(), padded=st.booleans(), closed=st.booleans()
)
def test_sdpa_is_the_reference(dtype, rows, more, grouped, padded, closed):
    gen = torch.Generator().manual_seed(rows * 100 + more)
    keys = rows + more
    draw = lambda *shape: torch.randn(*shape, generator=gen, dtype=dtype)  # noqa: E731
    query, key, value = (
        draw(2, 4, rows, 16),
        draw(2, 2 if grouped else 4, keys, 16),
        draw(2, 2 if grouped else 4, keys, 16),
    )
    ids = torch.randint(3, (2, keys), generator=gen, dtype=torch.uint8) if closed else None
    table = segment_table([(1, 2), (0, 0)]) if closed else None
    start = torch.randint(keys, (2,), generator=gen, dtype=torch.int32) if padded else None
    got = sdpa.attention(query, key, value, ids, table, start, 0.3)
    truth = reference.attention(query.double(), key.double(), value.double(), ids, table, start, 0.3, False, False)[0]
    assert got.dtype == dtype
    assert (got.double() - truth).abs().max() <= (1e-12 if dtype == torch.float64 else 2e-6)


@needs_extension
def test_command(own_cache, capsys):
    from mllm_fast.cli.machine import tune

    tune(as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["kept"] == str(paths.cache_file())
    assert set(found["paths"]) == set(paths.USES)
    assert all(found["paths"][use] in each for use, each in found["milliseconds"].items())
    tune()
    shown = capsys.readouterr().out
    assert "threads" in shown
    assert "linear layers in bfloat16" in shown
