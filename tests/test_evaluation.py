"""Evaluations: metrics against numbers computed by hand, the page, the command as a person runs it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import f1_score, precision_score, recall_score
from waiting import HANG

from mllm_fast import cli
from mllm_fast.cli.evaluate import evaluate
from mllm_fast.core.errors import InputError
from mllm_fast.core.layout import ImageLayout, Tile
from mllm_fast.evaluation.base import mean_and_error
from mllm_fast.evaluation.judges.judge import NounJudge, read_vocabulary, scores, shapes_judge
from mllm_fast.evaluation.registry import EVALUATIONS
from mllm_fast.evaluation.report import Chart, Report, Table, save, to_html
from mllm_fast.evaluation.run import run
from mllm_fast.evaluation.samples import Sample, Thing, pictures, scenes
from mllm_fast.evaluation.studies.attention_maps import EDGES, AttentionMaps, measures
from mllm_fast.evaluation.studies.attention_share import AttentionShare
from mllm_fast.evaluation.studies.knockout_sweep import KnockoutSweep, configurations
from mllm_fast.evaluation.studies.word_alignment import cells, widened, words_at_objects
from mllm_fast.evaluation.worker import ModelChoice
from mllm_fast.shapes.questions import describe
from mllm_fast.shapes.scenes import generate_scene


@settings(max_examples=50)
@given(st.integers(0, 2**32))
def test_the_noun_judge_is_exact_on_scenes(seed):
    scene = generate_scene(np.random.default_rng(seed))
    assert shapes_judge().objects(describe(scene)) == [f"{o.color} {o.shape}" for o in scene.objects]


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("Two dogs, a puppy and 3 people.", ["dog", "dog", "dog", "person", "person", "person"]),
        ("a big, brown bus; boxes", ["big brown bus", "box"]),
        ("the BROWN big\nbuses", ["big brown bus"]),
        ("dogma, boxer, 1999 dogs", ["dog"]),
        ("a red car", []),
        ("101 dogs", ["dog"]),
        ("a box kite, a box", ["box kite", "box"]),
        ("", []),
    ],
)
def test_noun_phrases(text, objects):
    judge = NounJudge(
        {"dog": ["puppy"], "person": ["people"], "bus": [], "box": [], "box kite": []}, {"big": ["large"], "brown": []}
    )
    assert judge.objects(text) == objects


def test_a_vocabulary_that_says_two_things_is_refused():
    with pytest.raises(InputError, match="'puppy' for 'dog' and for 'seal'"):
        NounJudge({"dog": ["puppy"], "seal": ["puppy"]})
    with pytest.raises(InputError, match="at least one noun"):
        NounJudge({})


def test_objects_are_matched_as_often_as_they_are_there():
    found = shapes_judge().compare("a red circle, a red circle, a blue star", "a red circle, a blue ring, a blue star")
    assert found.matched == ["blue star", "red circle"]
    assert found.counts == {"tp": 2, "fp": 1, "fn": 1}
    assert scores(**found.counts) == {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3}
    twice = shapes_judge().compare("two red circles", "a red circle and two red circles")
    assert twice.matched == ["red circle", "red circle"]
    assert scores(0, 0, 2) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}  # as in the paper
    assert scores(0, 0, 0) == {"precision": None, "recall": None, "f1": None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("dog", "a vocabulary is JSON"),
        ("[]", "a vocabulary is JSON"),
        ('{"nouns": {"dog": "puppy"}}', "a vocabulary is JSON"),
        ('{"nouns": ["dog", " "]}', "a vocabulary is JSON"),
        ('{"nouns": ["dog"], "verbs": []}', "nouns and attributes, not 'verbs'"),
        ('{"attributes": ["red"]}', "at least one noun"),
        (None, "no such file"),
    ],
)
def test_vocabularies_that_cannot_be_used(content, message, tmp_path):
    if content is not None:
        (tmp_path / "v.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_vocabulary(tmp_path / "v.json")


def test_a_vocabulary_of_ones_own(tmp_path):
    (tmp_path / "v.json").write_text('{"nouns": {"dog": ["puppy"]}, "attributes": ["big"]}')
    assert read_vocabulary(tmp_path / "v.json").objects("a big puppy") == ["big dog"]


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sets(st.integers(0, 5)), st.sets(st.integers(0, 5))), min_size=2, max_size=8))
def test_scores_are_those_of_scikit_learn(pictures):
    truth, said = (np.array([[i in sets[side] for i in range(6)] for sets in pictures]) for side in (0, 1))
    ours = [scores(len(a & b), len(b - a), len(a - b)) for a, b in pictures]
    for name, theirs in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        each = [theirs(t, s, zero_division=np.nan) for t, s in zip(truth, said, strict=True)]
        if name == "precision":  # as in the paper, 0 where there was something to name
            each = [0.0 if t.any() and not s.any() else e for t, s, e in zip(truth, said, each, strict=True)]
        assert [np.nan if one[name] is None else one[name] for one in ours] == pytest.approx(each, nan_ok=True)


def test_mean_and_error():
    assert mean_and_error([1, 2, 6]) == pytest.approx((3, 7**0.5 / 3**0.5))
    assert np.isnan(mean_and_error([1])[1])


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (1, ["from 0", "except 0-0"]),
        (6, [*(f"from {i}" for i in range(6)), "except 1-3"]),
        (32, [*(f"from {i}" for i in range(0, 32, 2)), "except 4-20"]),
        (80, [*(f"from {i}" for i in range(0, 80, 5)), "except 20-40"]),
    ],
)
def test_layers_of_the_sweep(layers, expected):
    assert configurations(layers) == expected


def test_bands_of_the_sweep(shapes):
    sweep = KnockoutSweep(bands=("1-2", "0-3"))
    sample = scenes(1).list[0]
    layers = [row["layers"] for row in sweep.rows(shapes, sample)]
    assert [one for one in layers if one.startswith("except")] == ["except 1-2", "except 0-3"] * 3
    report = sweep.report({sample.name: sweep.rows(shapes, sample)})
    assert [chart.name for chart in report.charts] == ["knockout-sweep", "knockout-bars"]
    assert "except 1-2" in report.says[0]
    with pytest.raises(InputError, match=r"a band is the first and the last layer.*got 'middle'"):
        KnockoutSweep(bands=("middle",))
    with pytest.raises(InputError, match="the model has layers 0 to"):
        KnockoutSweep(bands=("1-99",)).rows(shapes, sample)


def test_the_sweep_by_hand():
    row = lambda target, layers, tp, fp, fn: dict(target=target, layers=layers, said="x", tp=tp, fp=fp, fn=fn, tokens=1)  # noqa: E731
    rest = [row(t, w, 0, 0, 2) for t in ("generated", "query", "query+generated") for w in ("from 0", "except 0-0")]
    first = [row("", "", 2, 0, 0), row("generated", "from 0", 1, 1, 1), *rest[1:]]
    second = [row("", "", 2, 0, 0), row("generated", "from 0", 2, 0, 0), *rest[1:]]
    report = KnockoutSweep().report({"a": first, "b": second, "c": [{"error": "gone"}]})
    means = {(m["target"], m["layers"]): m for m in report.figures["means"]}
    assert means["generated", "from 0"]["f1"] == pytest.approx([0.75, 0.25])
    assert means["query", "from 0"]["precision"] == [0.0, 0.0]
    assert means["", ""]["recall"] == [1, 0]
    assert report.failed == {"c": "gone"}
    json.dumps(report.figures, allow_nan=False)


def test_shares_by_hand():
    row = lambda image: [{"layer": 0, "image_block": image, "text": 1 - image, "generated": 0.0}]  # noqa: E731
    report = AttentionShare().report({str(i): row(share) for i, share in enumerate((0.2, 0.4, 0.5, 0.8, 0.9))})
    assert [q[0] for q in report.figures["quartiles"]["image_block"]] == pytest.approx([0.4, 0.5, 0.8])
    assert report.tables[0].rows[0][1] == "50.0 (40.0-80.0)"


@pytest.mark.parametrize("family", ["internvl"], indirect=True)
def test_the_papers_three_shares(vlm, picture):
    """They sum to 1; the text's share holds the system's tokens and the marks around the image."""
    sample = Sample("one", picture)
    three, five = (AttentionShare(max_new_tokens=3, apart=apart).rows(vlm, sample) for apart in (False, True))
    layout = vlm.generate(picture, "Describe the image.", max_new_tokens=3).layout
    separators, block = set(layout.separators.tolist()), set(layout.positions("image_block").tolist())
    assert separators - block, "the marks around the image are none of its block"
    for a, b in zip(three, five, strict=True):
        assert list(a) == ["layer", "image_block", "text", "generated"]
        assert a["image_block"] + a["text"] + a["generated"] == pytest.approx(1)
        assert a["generated"] == pytest.approx(b["generated"])
        assert a["image_block"] >= b["image"] - 1e-7
        assert a["text"] >= b["system"] + b["query"] - 1e-7
    maps = AttentionMaps(max_new_tokens=3).rows(vlm, sample)
    for a, one in zip(five, maps, strict=True):  # the same generated rows
        assert one["image"] == pytest.approx(a["image"], abs=1e-6)
    with pytest.raises(InputError, match="attention_share"):
        vlm.generate(picture, "x", attention_share="three")


def test_how_attention_is_spread_by_hand():
    """40 tokens: two of them (5 %) get 0.3 and 0.1, the others 0.01 each."""
    values = np.full(40, 0.01)
    values[[3, 7]] = 0.3, 0.1
    found = measures(values)
    assert found["image"] == pytest.approx(0.78)
    assert found["top"] == pytest.approx(0.4 / 0.78)
    pairs = np.abs(values[:, None] - values[None]).sum()
    assert found["gini"] == pytest.approx(pairs / (2 * 40 * values.sum()))
    counts = {(round(low, 9), n) for low, n in zip(EDGES, found["counts"], strict=False) if n}
    assert sum(n for _, n in counts) == 40
    assert {n for low, n in counts if low <= 0.01} == {38}
    assert measures(np.array([0.0, 0.0]))["counts"][0] == 2
    assert measures(np.zeros(2))["top"] == 0
    assert measures(np.array([0.5, 0.5]))["gini"] == 0


def test_attention_maps_by_hand():
    def row(layer, top):
        return {"layer": layer, "map": [[0.1, 0.2]], "counts": [1] * 35, "image": 0.3, "top": top, "gini": 0.5}

    report = AttentionMaps().report({"a": [row(0, 0.2), row(1, 0.6)], "b": [row(0, 0.4), row(1, 0.8)]})
    assert report.figures["top"] == pytest.approx([0.3, 0.7])
    assert report.figures["counts"] == [[2] * 35] * 2
    assert "get 70% of the image's attention in layer 1 and 30% in layer 0; 50% on average" in report.says[0]


def test_cells_of_a_mask():
    """An image of 40 x 20 of which the grid's 2 x 2 tokens cover the middle 20 x 20."""
    layout = ImageLayout(torch.arange(4), (40, 20), (Tile(2, 2, (10.0, 0.0, 30.0, 20.0)),))
    mask = np.zeros((20, 40), bool)
    mask[9, 19] = mask[0, 0] = True  # the second one lies outside
    assert cells(mask, layout).tolist() == [[True, False], [False, False]]
    mask[10, 20] = True
    assert cells(mask, layout).tolist() == [[True, False], [False, True]]
    with pytest.raises(InputError, match="the mask is 20 x 40 pixels, its image 40 x 20"):
        cells(mask.T, layout)


def test_widened():
    one = np.zeros((4, 5), bool)
    one[0, 1] = True
    assert widened(one, 0).tolist() == one.tolist()
    assert widened(one, 1).sum() == 6
    assert widened(one, 1)[:2, :3].all()
    assert widened(one, 9).all()


def test_pictures_of_a_folder(tmp_path):
    (tmp_path / "deep").mkdir()
    Image.new("RGB", (30, 20), "red").save(tmp_path / "b.JPG")
    Image.new("RGB", (30, 20), "red").save(tmp_path / "deep" / "a.png")
    (tmp_path / "c.png").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("-")
    found = pictures(tmp_path)
    assert [sample.name for sample in found.list] == ["b.JPG", "c.png", "deep/a.png"]
    rows = run(AttentionShare(max_new_tokens=2), found, ModelChoice(device="cpu", threads=1), tmp_path / "out")
    assert "c.png" in rows["c.png"][0]["error"]
    assert len(rows["b.JPG"]) == 6
    report = AttentionShare().report(rows)
    assert report.figures["samples"] == 2
    assert list(report.failed) == ["c.png"]
    with pytest.raises(InputError, match="no folder"):
        pictures(tmp_path / "gone")
    with pytest.raises(InputError, match="holds no image"):
        pictures(tmp_path / "out")
    with pytest.raises(InputError, match="at least 1, got 0"):
        scenes(0)


def test_a_page_stands_alone(tmp_path):
    """Nothing is fetched, nothing is taken for markup."""
    chart = Chart("c", lambda figure: figure.subplots().plot([1, 2]), "a <line>")
    report = Report("n", "T & t", ["<says>"], [Table("t", ["a", "b"], [["<x>", "1"]])], [chart], {}, {"s": "<why>"})
    save(report, tmp_path, {"seed": 1})
    page = (tmp_path / "report.html").read_text()
    for text in ("<says>", "<x>", "<why>", "<line>"):
        assert text not in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("data:image/png;base64,") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"report.html", "report.md", "figures.json", "c.png"}
    assert "| &" not in (tmp_path / "report.md").read_text()
    assert to_html([(report, {}), (report, {})], "both").count("<h2") == 2


@pytest.mark.parametrize(
    "tokens", [["a", " red", " cir", "cle"], ["a ", "red ", "cir", "cle"], ["a", " ", "red ", "circle"]]
)
def test_a_words_token_is_the_one_its_noun_begins_in(tokens):
    layout = ImageLayout(torch.arange(4), (20, 20), (Tile(2, 2, (0.0, 0.0, 20.0, 20.0)),))
    ex = SimpleNamespace(tokens=tokens, layout=SimpleNamespace(images=[layout]))
    mask = np.zeros((20, 20), bool)
    mask[1, 15] = True
    (word,) = words_at_objects(ex, shapes_judge(), [Thing("red circle", mask), Thing("blue star", ~mask)], 0)
    assert tokens[word.token].strip().startswith("cir")
    assert word.hits.tolist() == [[False, True], [False, False]]


def test_what_was_corrected_is_kept(tmp_path):
    report = Report("one", "One", [], [], [], {"mean": float("nan")}, files={"labels.csv": "a"})
    save(report, tmp_path, {})
    save(report, tmp_path, {})
    assert not (tmp_path / "labels.new.csv").exists()
    (tmp_path / "labels.csv").write_text("corrected")
    save(report, tmp_path, {})
    assert (tmp_path / "labels.csv").read_text() == "corrected"
    assert (tmp_path / "labels.new.csv").read_text() == "a"
    assert json.loads((tmp_path / "figures.json").read_text())["mean"] is None


def test_without_matplotlib_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"pip install .*\[viz\]"):
        evaluate("attention-share")
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path, run, monkeypatch):
    """In a process of its own, and again in this one."""
    command = [sys.executable, "-m", "mllm_fast.cli", "eval", "all", "--count", "2", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert tuple(found) == EVALUATIONS.names()
    assert all(one["failed"] == {} for one in found.values())
    folder = tmp_path / "mllm-fast-eval"
    rows = folder / "localisation" / "rows.jsonl"
    before = rows.stat().st_mtime_ns
    time.sleep(0.01)
    monkeypatch.chdir(tmp_path)
    code, again, told = run("eval", "localisation", "--count", 2, "--parquet")
    assert code == 0, told
    assert "Does a word look at its object?" in again
    assert rows.stat().st_mtime_ns == before
    assert rows.with_suffix(".parquet").exists()
    code, _, told = run("eval", "localisation", "--count", 2, "--seed", 3)
    assert code == 2
    assert "other settings" in told
    assert (folder / "report.html").read_text().count("<h2") == len(EVALUATIONS.names())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chair"], "the evaluation is one of attention-share"),
        (["mme", "--data", "."], "holds no task of MME"),
        (["pope", "--data", "."], "holds no file of POPE's questions"),
        (["localisation", "--data", "."], "is a benchmark's folder"),
        (["mme", "--images", "."], "give the benchmark's folder with --data"),
        (["mme", "--keep", "5"], "--keep is a share here, 5% or 0.05, got 5"),
        (["attention-share", "--images", "gone"], "is no folder of images"),
        (["localisation", "--images", "."], "give --masks"),
        (["fidelity", "--images", "."], "fidelity needs your images' objects: give --masks"),
        (["localisation", "--masks", "."], "give their folder with --images"),
        (["localisation", "--images", ".", "--masks", "gone.json"], "there is no such file"),
        (["mme", "--count", "0"], "at least 1, got 0"),
        (["all", "--images", "."], "all runs on generated scenes"),
        (["pope", "--images", "."], "give the benchmark's folder with --data"),
        (["attention-share", "--processes", "0"], "processes is at least 1"),
        (["knockout-sweep", "--images", "."], "give --vocabulary or --judge-model"),
        (["judges"], "give --labels"),
        (["mme", "--labels", "x.csv"], "give --labels"),
        (["judges", "--labels", "gone.csv"], "there is no such file"),
        (["heads", "--question", "what?"], "names the object as {noun}"),
        (["knockout-sweep", "--reference", "me"], "reference is one of answer, truth, got 'me'"),
    ],
)
def test_bad_commands(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mllm-fast", "eval", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert message in err
    assert not out
