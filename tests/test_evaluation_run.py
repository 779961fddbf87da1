"""Runs of an evaluation: rows that survive a kill, processes and a Ray job that decide nothing."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys

import pyarrow.parquet
import pytest
from waiting import HANG

from mllm_fast.core.errors import InputError
from mllm_fast.evaluation.rows import Rows, write_parquet
from mllm_fast.evaluation.run import run
from mllm_fast.evaluation.samples import Sample, Samples, scenes
from mllm_fast.evaluation.studies.attention_share import AttentionShare
from mllm_fast.evaluation.worker import ModelChoice

MODEL = ModelChoice(device="cpu", threads=1)


def test_rows_after_a_kill(tmp_path):
    """A line that was cut off is dropped, and its sample made again."""
    rows = Rows(tmp_path / "run", {"seed": 1})
    with rows.open():
        rows.append("ä", [{"x": 1}])
        rows.append("b", [])
    path = tmp_path / "run" / "rows.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) - 3])
    with rows.open():
        assert rows.read() == {"ä": [{"x": 1}], "b": []}
        rows.append("c", [{"x": 2}])
        assert list(rows.read()) == ["ä", "b", "c"]
    with pytest.raises(ValueError, match="Out of range float"), rows.open():
        rows.append("d", [{"x": float("nan")}])
    with rows.open():
        assert list(rows.read()) == ["ä", "b", "c"]


def test_rows_as_parquet(tmp_path):
    rows = {"a": [{"x": 1, "hits": [True, False]}, {"x": 2, "hits": []}], "b": [{"error": "gone"}]}
    write_parquet(rows, tmp_path / "rows.parquet")
    found = pyarrow.parquet.read_table(tmp_path / "rows.parquet").to_pylist()
    assert found[0] == {"sample": "a", "x": 1, "hits": [True, False], "error": None}
    assert found[2] == {"sample": "b", "x": None, "hits": None, "error": "gone"}
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]


def test_a_full_disk_leaves_no_half_line(tmp_path):
    rows = Rows(tmp_path, {})
    with rows.open():
        rows.append("a", [])
        before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
            with pytest.raises(OSError, match="disk is full"):
                rows.append("b", [{"text": "x" * 500}])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        rows.append("c", [])
        assert list(rows.read()) == ["a", "c"]


def test_a_folder_holds_one_run(tmp_path):
    first, second = (Rows(tmp_path, {"seed": 1}).open() for _ in range(2))
    with first, pytest.raises(InputError, match="another run writes there"), second:
        pass
    with pytest.raises(InputError, match=r"other settings \(seed was 1, is 2\);"), Rows(tmp_path, {"seed": 2}).open():
        pass
    (tmp_path / "run.json").write_text("[")
    with pytest.raises(InputError, match="not the settings of a run"), Rows(tmp_path, {"seed": 1}).open():
        pass
    (tmp_path / "run.json").unlink()
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(InputError, match="rows without the settings"), Rows(tmp_path, {"seed": 1}).open():
        pass


def test_processes_and_kills_decide_nothing(tmp_path):
    """The same rows from one process, from two, and from a run that was killed and went on."""
    count, evaluation = 4, AttentionShare(max_new_tokens=6)
    alone = run(evaluation, scenes(count), MODEL, tmp_path / "one")
    two = run(evaluation, scenes(count), MODEL, tmp_path / "two", processes=2)
    assert alone == two
    command = [sys.executable, "-c", _ENDLESS.format(folder=str(tmp_path / "killed"))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=tmp_path)
    process.stdout.readline()  # the first sample is done
    process.kill()
    process.wait()
    process.stdout.close()
    path = tmp_path / "killed" / "rows.jsonl"
    held = path.read_bytes().count(b"\n")
    assert 1 <= held < 200
    told = []
    again = run(evaluation, scenes(max(count, held)), MODEL, tmp_path / "killed", progress=lambda *p: told.append(p))
    assert told[0][0] == held
    assert {name: again[name] for name in alone} == alone
    lines = path.read_bytes().splitlines()
    assert len(lines) == len({json.loads(line)["sample"] for line in lines}) == max(count, held)


def test_a_ray_job_gives_the_same_rows(tmp_path):
    """In a process of its own: Ray starts servers. A sample that cannot be used is told from the others there too."""
    samples = scenes(3)
    missing = Sample("gone", tmp_path / "gone.png", ())
    samples = Samples([*samples.list, missing], samples.origin)
    alone = run(AttentionShare(max_new_tokens=6), samples, MODEL, tmp_path / "one")
    script = _RAY.format(folder=str(tmp_path / "ray"), gone=str(tmp_path / "gone.png"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=HANG)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == alone
    assert "error" in alone["gone"][0]
    lines = (tmp_path / "ray" / "rows.jsonl").read_bytes().splitlines()
    assert len(lines) == len({json.loads(line)["sample"] for line in lines}) == 4


_RAY = """
import json
from pathlib import Path
from mllm_fast.evaluation.studies.attention_share import AttentionShare
from mllm_fast.evaluation.run import run
from mllm_fast.evaluation.worker import ModelChoice
from mllm_fast.evaluation.samples import Sample, Samples, scenes
some = scenes(3)
some = Samples([*some.list, Sample("gone", Path({gone!r}), ())], some.origin)
found = run(AttentionShare(max_new_tokens=6), some, ModelChoice(device="cpu"), Path({folder!r}), 2, ray=True)
print(json.dumps(found))
"""


_ENDLESS = """
from pathlib import Path
from mllm_fast.evaluation.studies.attention_share import AttentionShare
from mllm_fast.evaluation.run import run
from mllm_fast.evaluation.worker import ModelChoice
from mllm_fast.evaluation.samples import scenes
tell = lambda done, total: done and print(done, flush=True)
model = ModelChoice(device="cpu", threads=1)
run(AttentionShare(max_new_tokens=6), scenes(200), model, Path({folder!r}), progress=tell)
"""


def test_what_was_missing_is_tried_again(tmp_path):
    """And nothing else; no sample is there twice."""
    listed = scenes(2).list
    late = Sample("late", tmp_path / "late.png")
    samples, folder = Samples([listed[0], late, listed[1]], {}), tmp_path / "rows"
    first = run(AttentionShare(max_new_tokens=4), samples, MODEL, folder)
    assert "late.png" in first["late"][0]["error"]
    listed[0].scene.image.save(tmp_path / "late.png")
    told = []
    again = run(AttentionShare(max_new_tokens=4), samples, MODEL, folder, progress=lambda *p: told.append(p))
    assert told[0] == (2, 3)
    assert [row["layer"] for row in again["late"]] == list(range(6))
    assert all(again[name] == first[name] for name in ("scene 0", "scene 1"))
    names = [json.loads(line)["sample"] for line in (folder / "rows.jsonl").read_bytes().splitlines()]
    assert sorted(names) == ["late", "scene 0", "scene 1"]


def test_settings_that_are_new_are_named(tmp_path):
    Rows(tmp_path, {"name": "mme"}).open().__enter__()
    with (
        pytest.raises(InputError, match="reader was absent, is None"),
        Rows(tmp_path, {"name": "mme", "reader": None}).open(),
    ):
        pass


def test_samples_of_one_name_are_refused(tmp_path):
    samples = scenes(1)
    with pytest.raises(InputError, match="two samples are called 'scene 0'"):
        run(AttentionShare(), Samples([*samples.list, *samples.list], {}), MODEL, tmp_path)
