"""MME and POPE: folders in their published formats, with what real ones hold; figures by hand and by scikit-learn."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from mllm_fast.core.errors import InputError
from mllm_fast.evaluation.datasets import mme, pope, scene_pairs
from mllm_fast.evaluation.run import run
from mllm_fast.evaluation.samples import YesNo
from mllm_fast.evaluation.studies.yes_no import (
    Mme,
    Pope,
    Redundancy,
    Way,
    accuracies,
    detection,
    mean_over_tasks,
    meaning,
    meaning_by_mme,
    ways,
)
from mllm_fast.evaluation.worker import ModelChoice

MODEL = ModelChoice(device="cpu", threads=1)
PAIR = "Is there a dog? Please answer yes or no.\tYes\nIs there a cat?\tNo\n"


def picture(path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 20), "red").save(path)


@pytest.fixture
def mme_folder(tmp_path):
    """A task with everything side by side, one with folders; Windows lines, spaces, both endings, all that can miss."""
    root = tmp_path / "MME"
    picture(root / "existence" / "000 1.jpg")
    (root / "existence" / "000 1.txt").write_bytes(b"\xef\xbb\xbf" + PAIR.replace("\n", "\r\n").encode() + b"\r\n")
    picture(root / "existence" / "0002.PNG")
    (root / "existence" / "0002.txt").write_text(" Is there\ta dog? \t yes.\nIs there a cat?\tNO")
    (root / "existence" / "0003.txt").write_text(PAIR)
    picture(root / "posters" / "images" / "a.jpg")
    inner = root / "posters" / "questions_answers_YN"
    inner.mkdir()
    (inner / "a.txt").write_text(PAIR)
    for name in ("b.png", "c.png", "d.png", "e.png", "f.png", "f.jpg"):
        picture(root / "posters" / "images" / name)
    (inner / "b.txt").write_text("Is there a dog?\tYes\n")
    (inner / "c.txt").write_text("Is there a dog? Yes\nIs there a cat?\tNo\n")
    (inner / "d.txt").write_text("Is there a dog?\tMaybe\nIs there a cat?\tNo\n")
    (inner / "f.txt").write_text(PAIR)
    (root / "readme.txt").write_text("-")
    return root


def test_mme_as_it_is_published(mme_folder):
    found = {sample.name: sample for sample in mme(mme_folder).list}
    dog, cat = YesNo("Is there a dog? Please answer yes or no.", True), YesNo("Is there a cat?", False)
    assert found["existence/000 1"].questions == (dog, cat)
    assert found["existence/0002"].questions == (YesNo("Is there\ta dog?", True), cat)
    assert found["posters/a"].questions == (dog, cat)
    problems = {name: sample.problem for name, sample in found.items() if sample.problem}
    assert problems == {
        "existence/0003": "existence/0003: its image is missing",
        "posters/b": "posters/b: has 1 questions, MME asks two of an image",
        "posters/c": "posters/c: 'Is there a dog? Yes' is no question, a tab, and yes or no",
        "posters/d": "posters/d: 'Is there a dog?\\tMaybe' is no question, a tab, and yes or no",
        "posters/e": "posters/e: its text file of questions is missing",
        "posters/f": "posters/f: its image is there 2 times",
    }
    assert {sample.group for sample in found.values()} == {"existence", "posters"}
    assert [sample.name for sample in mme(mme_folder, 1).list] == ["existence/000 1", "posters/a"]


def test_problems_are_rows(mme_folder, tmp_path):
    """What cannot be used is counted, and its reason shown; an image that is damaged too."""
    (mme_folder / "posters" / "images" / "a.jpg").write_bytes(b"-")
    evaluation = Mme(max_new_tokens=1)
    report = evaluation.report(run(evaluation, mme(mme_folder), MODEL, tmp_path / "out"))
    assert report.figures["samples"] == 2
    assert len(report.failed) == 7
    assert "a.jpg" in report.failed["posters/a"]


@pytest.mark.parametrize("lines", [True, False])
def test_pope_as_it_is_published(lines, tmp_path):
    for name in ("COCO_val2014_000000310196.jpg", "a b.png"):
        picture(tmp_path / "val2014" / name)
    asked = [
        {"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a dog?", "label": "yes"},
        {"question_id": 2, "image": "a b.png", "text": "Is there a cat?", "label": "No"},
        {"question_id": 3, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a car?", "label": "no"},
        {"question_id": 4, "image": "gone.jpg", "text": "Is there a car?", "label": "no"},
    ]
    content = "\r\n".join(map(json.dumps, asked)) + "\r\n" if lines else json.dumps(asked)
    (tmp_path / "coco_pope_popular.json").write_text(content)
    (tmp_path / "coco_pope_random.json").write_text(json.dumps(asked[1] | {"label": "perhaps"}) + "\n")
    found = {sample.name: sample for sample in pope(tmp_path).list}
    first = found["coco_pope_popular/COCO_val2014_000000310196.jpg"]
    assert first.questions == (YesNo("Is there a dog?", True), YesNo("Is there a car?", False))
    assert first.group == "coco_pope_popular"
    assert found["coco_pope_popular/a b.png"].questions == (YesNo("Is there a cat?", False),)
    assert found["coco_pope_popular/gone.jpg"].problem.endswith("its image is missing")
    assert "got 'perhaps'" in found["coco_pope_random/a b.png"].problem
    assert len(pope(tmp_path, tmp_path / "val2014", 1).list) == 2


ASKED = [
    {"question_id": n, "image": "a b.png", "text": f"Is there a {what}?", "label": "yes"}
    for n, what in enumerate(("dog", "cat"))
]


def lines(entries) -> str:
    return "".join(json.dumps(one) + "\n" for one in entries)


LAYOUTS = {
    "lines, .json": {"coco_pope_random.json": lines(ASKED)},
    "a list": {"coco_pope_random.json": json.dumps(ASKED)},
    "lines, .jsonl": {"coco_pope_random.jsonl": lines(ASKED)},
    "both endings": {"coco_pope_random.jsonl": lines(ASKED), "coco_pope_random.json": json.dumps(ASKED)},
    "LLaVA's": {
        "coco/coco_pope_random.json": lines(ASKED),
        "llava_pope_test.jsonl": lines({k: v for k, v in one.items() if k != "label"} for one in ASKED),
        "answers/llava-v1.5-7b.jsonl": lines({"question_id": 0, "text": "Yes", "answer_id": n} for n in range(2)),
    },
    "the authors' repository": {
        "output/coco/coco_pope_random.json": lines(ASKED),
        "segmentation/coco_ground_truth_segmentation.json": lines([{"image": "a b.png", "objects": ["dog"]}]),
        "output/coco/coco_ground_truth_objects.json": json.dumps({"dog": 3}),
        "answers.json": lines([{"question": "Is there a dog?", "answer": "Yes"}]),
    },
    "a model's settings beside it": {"x/coco_pope_random.json": lines(ASKED), "config.json": '{"a": {"b": 1}}'},
    "a file that is none": {"coco_pope_random.json": lines(ASKED), "notes.json": "not json"},
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("file", [False, True])
def test_pope_as_it_is_found(name, file, tmp_path):
    """The questions alone become samples; each other file is named in a note."""
    picture(tmp_path / "val2014" / "a b.png")
    folder = tmp_path / "pope"
    for path, content in LAYOUTS[name].items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)
    asking = next(path for path in LAYOUTS[name] if "pope_random" in path)
    found = pope(folder / asking if file else folder, tmp_path / "val2014")
    (sample,) = found.list
    assert sample.group == "coco_pope_random"
    assert not sample.problem
    assert [one.text for one in sample.questions] == ["Is there a dog?", "Is there a cat?"]
    assert len(found.notes) == (0 if file else len(LAYOUTS[name]) - 1)
    assert all("is left out" in note for note in found.notes)


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (mme, None, "holds no task of MME"),
        (pope, None, "holds no file of POPE's questions"),
        (pope, "not json", "x_random.json is left out: it is no list of questions"),
        (pope, "[1]", "x_random.json is left out: it is no list of questions"),
        (pope, '{"image": "a", "text": "?"}', "x_random.json is left out: its entries have no label"),
        (lambda folder: pope(folder, folder / "gone"), "", "is no folder of images"),
    ],
)
def test_folders_that_cannot_be_used(read, content, message, tmp_path):
    if content is not None:
        (tmp_path / "x_random.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path)
    with pytest.raises(InputError, match="gone"):
        read(tmp_path / "gone")


@pytest.mark.parametrize(
    ("said", "yes"),
    [
        ("Yes", True),
        ("no.", False),
        ("I think yes, there is no doubt", True),
        ("nothing", None),
        ("", None),
        ("NO", False),
    ],
)
def test_what_an_answer_means(said, yes):
    assert meaning(said) is yes


def row(truth: bool, yes: bool | None, tokens: int = 10) -> dict:
    return {"truth": truth, "yes": yes, "tokens": tokens}


def test_accuracies_by_hand():
    """Three images: both right, one right, one right and one with neither yes nor no."""
    pictures = [
        [row(True, True), row(False, False)],
        [row(True, True), row(False, True)],
        [row(True, None, 40), row(False, False)],
    ]
    found = accuracies(pictures)
    assert found == pytest.approx({"ACC": 400 / 6, "ACC+": 100 / 3, "neither": 100 / 6, "tokens": 15})


def test_detection_by_hand():
    rows = [row(True, True), row(True, True), row(True, False), row(False, True), row(False, None)]
    expected = {"accuracy": 40, "precision": 200 / 3, "recall": 200 / 3, "F1": 200 / 3, "yes": 60, "neither": 20}
    assert detection(rows) == pytest.approx(expected)
    assert detection([row(False, False)])["F1"] is None


@settings(max_examples=40)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_detection_is_that_of_scikit_learn(pairs):
    truth, said = zip(*pairs, strict=True)
    found = detection([row(t, s) for t, s in pairs])
    assert found["accuracy"] == pytest.approx(100 * accuracy_score(truth, said))
    for name, theirs in (("precision", precision_score), ("recall", recall_score), ("F1", f1_score)):
        expected = 100 * theirs(truth, said, zero_division=np.nan)
        assert (np.nan if found[name] is None else found[name]) == pytest.approx(expected, nan_ok=True)


def test_ways():
    assert [way.name for way in ways((0.05, 0.2, 0.05))] == [
        "full", "query + 20 %", "query + 5 %", "query alone", "20 % alone", "5 % alone",
    ]  # fmt: skip
    assert [way.name for way in ways((1.0,))] == ["full", "query alone", "100 % alone"]
    assert ways(()) == [Way(1.0, "query+image")]
    with pytest.raises(InputError, match="keep"):
        Mme((1.5,))


def test_scenes_and_what_is_kept_of_them(tmp_path):
    """A yes and a no a scene; fewer tokens are read where less is kept; the reports hold together."""
    samples = scene_pairs(3)
    assert all([q.truth for q in sample.questions] == [True, False] for sample in samples.list)
    shares = (0.05, 1.0)
    for evaluation in (Mme(shares), Redundancy(shares), Pope(shares)):
        rows = run(evaluation, samples, MODEL, tmp_path / evaluation.name)
        report = evaluation.report(rows)
        assert report.figures["samples"] == 3
        json.dumps(report.figures, allow_nan=False)
        [chart.png() for chart in report.charts]
    (one, *_) = rows.values()
    tokens = {r["way"]: r["tokens"] for r in one}
    assert tokens["full"] - tokens["query + 5 %"] == 144 - 8
    assert tokens["query + 5 %"] - tokens["query alone"] == 8
    report = Mme(shares).report(rows)
    assert report.figures["total"]["full"]["ACC"] >= 50
    assert report.tables[2].rows[0][0] == "existence"
    assert Pope(shares).report({"a": [{"error": "x"}]}).failed == {"a": "x"}


@pytest.mark.parametrize(
    ("said", "mme", "first"),
    [
        ("Yes", True, True),
        (" no.", False, False),
        ("Yes, there is no dog.", True, True),
        ("The answer is yes.", None, True),
        ("Not there, yes", False, True),
        ("I know it", None, None),
        ("eyes", True, None),
        ("", None, None),
    ],
)
def test_the_two_ways_to_read_an_answer(said, mme, first):
    """MME's script looks for the letters in the first four, ours for the first whole word."""
    assert meaning_by_mme(said) is mme
    assert meaning(said) is first


def test_the_mean_over_tasks_by_hand():
    """Tasks count alike, however many images they have; table 1's first row is the mean of its ten columns."""
    nothing = float("nan")
    small = {"ACC": 50.0, "ACC+": 0.0, "neither": 10.0, "tokens": 20.0}
    large = {"ACC": 100.0, "ACC+": 100.0, "neither": 0.0, "tokens": nothing}
    assert mean_over_tasks([small, large]) == {"ACC": 75.0, "ACC+": 50.0, "neither": 5.0, "tokens": 20.0}


def test_naive_asks_about_the_image_from_the_start(shapes):
    sample = scene_pairs(1).list[0]
    rows = Mme((0.1,)).rows(shapes, sample)
    naive = [row for row in rows if row["way"] == "naive"]
    assert [row["way"] for row in rows[: len(naive)]] == ["naive"] * len(sample.questions)
    for row, question in zip(naive, sample.questions, strict=True):
        own = shapes.generate(sample.image, question.text, max_new_tokens=16)
        assert (row["said"], row["tokens"]) == (own.text, own.layout.prompt_length)
        assert row["yes"] is meaning_by_mme(own.text)
    report = Mme((0.1,)).report({sample.name: rows})
    mean = report.tables[0]
    assert mean.rows[0][0] == "naive"
    assert mean.rows[0][-2:] == ["100.0", "100.0"]
    with pytest.raises(InputError, match=r"--task is one of .*, got nowhere"):
        Mme((0.1,), tasks=("nowhere",)).report({sample.name: rows})


def test_the_paper_counts_the_tasks_of_perception():
    row = lambda group, truth, said: {"way": "full", "group": group, "truth": truth, "yes": said, "tokens": 5}  # noqa: E731
    rows = {
        "a": [row("existence", True, True)] * 2,
        "b": [row("OCR", True, False)] * 2,
        "c": [row("code_reasoning", True, True)] * 2,
    }
    report = Mme().report(rows)
    assert report.figures["mean"]["full"]["ACC"] == 50
    assert "code_reasoning do not count" in report.says[-2] + report.says[-1]
    assert Mme(tasks=("code_reasoning",)).report(rows).figures["mean"]["full"]["ACC"] == 100
