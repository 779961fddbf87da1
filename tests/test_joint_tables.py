"""The tables of arXiv 2405.14612, section 4.2 and 4.4, by the paper's protocol."""

from __future__ import annotations

import json

import pytest
import torch

from mllm_fast.core.errors import InputError
from mllm_fast.evaluation.coco_objects import categories, coco
from mllm_fast.evaluation.joint.answers_and_boxes import AnswersAndBoxes, meaning
from mllm_fast.evaluation.joint.bias import swapped_scenes
from mllm_fast.evaluation.joint.bias_table import BiasTable, number_in
from mllm_fast.evaluation.samples import scenes
from mllm_fast.joint import JointModel
from mllm_fast.joint.perturb import signed_step


@pytest.fixture(scope="module")
def joint(shapes):
    return JointModel.from_pretrained("shapes", vlm=shapes)


def test_the_table_of_yes_and_no_by_hand():
    row = lambda truth, said, score: {  # noqa: E731
        **{"class": "dog", "truth": truth, "said": said, "score": score, "box": [1, 2, 3, 4]}
    }
    rows = {
        "a": [row(False, "yes", 0.6), row(False, "no", 0.1), row(True, "yes", 0.9), row(False, "other", 0.99)],
        "b": [row(False, "yes", 0.2), row(False, "no", 0.3), row(True, "no", 0.5)],
    }
    report = AnswersAndBoxes("shapes", ["dog"], "is there a {}?").report(rows)
    scores = report.figures["scores"]
    assert scores["not there, yes"] == {"mean": pytest.approx(0.4), "count": 2}
    assert scores["not there, no"] == {"mean": pytest.approx(0.2), "count": 2}
    assert scores["there, yes"] == {"mean": pytest.approx(0.9), "count": 1}
    assert scores["there, no"] == {"mean": pytest.approx(0.5), "count": 1}
    assert report.figures["other"] == 1
    assert report.figures["auroc of yes, absent"] == pytest.approx(3 / 4)  # 0.6 above both noes, 0.2 above one
    assert [line[:3] for line in report.tables[1].rows] == [["a", "dog", "0.600"], ["b", "dog", "0.200"]]
    assert report.tables[0].rows[0] == ["not there", "0.400 ± 0.200", "2", "0.200 ± 0.100", "2"]


@pytest.mark.parametrize(
    ("text", "said"),
    [("Yes.", "yes"), (" no ", "no"), ("NO", "no"), ("Yes, there is", "other"), ("", "other"), ("nobody", "other")],
)
def test_what_an_answer_means(text, said):
    assert meaning(text) == said


def test_answers_and_boxes_of_a_scene(joint, shapes):
    """Against single calls of the model and the detector; more classes than are asked about at a time."""
    sample = scenes(1, 3).list[0]
    classes = ["circle", "square", "star", "ring"] * 5
    study = AnswersAndBoxes("shapes", classes, "is there a {}?", "a photo of a {}")
    found = study.rows(shapes, sample)
    assert [row["class"] for row in found] == classes
    for row in found[:4]:
        assert row["said"] == joint.generate(sample.image, f"is there a {row['class']}?", max_new_tokens=4).text
        boxes = joint.boxes(sample.image, [f"a photo of a {row['class']}"])
        assert row["score"] == pytest.approx(float(boxes.logits.sigmoid().max()), abs=1e-6)
        assert row["truth"] == any(thing.name.endswith(row["class"]) for thing in sample.things)
    for wrong in ("is it there?", "{} {}"):
        with pytest.raises(InputError, match=r"one \{\} for the class"):
            AnswersAndBoxes("shapes", classes, wrong)


def test_a_signed_step_is_that_of_the_squared_loss(joint):
    """The sign of the gradient of the squared distance from targets of -1e6 and 1e6, in float64."""
    seen = joint.see(scenes(1, 4).list[0].image)
    owl = joint.owl
    lower = owl.embed_queries(["a photo of a red object", "a photo of a star"])
    higher = owl.embed_queries(["a photo of a blue object"])
    found = signed_step(owl, seen.vision, lower, higher, 0.25)
    moved = (found - seen.vision.tokens).double()
    nonzero = moved.abs() > 0
    torch.testing.assert_close(moved[nonzero].abs(), torch.full_like(moved[nonzero], 0.25), rtol=1e-4, atol=1e-4)
    assert nonzero.float().mean() > 0.99
    owl.model.double()
    try:
        leaf = seen.vision.tokens.detach().clone().double().requires_grad_()
        with torch.enable_grad():
            logits = owl.logits(owl.features(leaf), torch.cat([lower, higher]).clone().double())
            targets = torch.tensor([-1e6, -1e6, 1e6], dtype=torch.float64)
            ((logits - targets) ** 2).mean().backward()
    finally:
        owl.model.float()
    sure = leaf.grad.abs() > 1e-3 * leaf.grad.abs().mean()  # float32 may turn the sign of the smallest
    assert (moved.sign()[sure] == -leaf.grad.sign()[sure]).float().mean() > 0.999
    with torch.no_grad():
        queries = torch.cat([lower, higher])
        before, after = (owl.logits(owl.features(one), queries) for one in (seen.vision.tokens, found))
    change = (after - before).sum(0)
    assert change[:2].sum() < 0 < change[2]
    with pytest.raises(InputError, match="above 0"):
        signed_step(owl, seen.vision, lower, higher, 0.0)


def test_the_table_of_biases_by_hand():
    row = lambda group, before, after: {  # noqa: E731
        **{"property": "honest", "group": group, "before": before, "after": after}
    }
    rows = {
        "1": [row("first", 5, 7)],
        "2": [row("first", 6, 7)],
        "3": [row("second", 8, 5)],
        "4": [row("second", 8, None)],
    }
    study = BiasTable("shapes", ("woman", "man"), (["a woman"], ["a man"]), ["honest"], "how {}?")
    report = study.report(rows)
    effects = report.figures["effects"]["honest"]
    assert effects["woman → man"]["mean"] == pytest.approx(1.5)
    assert effects["woman → man"]["interval"] == pytest.approx(1.96 * 0.5)
    assert effects["woman → man"]["before"] == pytest.approx(5.5)
    assert effects["man → woman"]["mean"] == pytest.approx(-3)
    assert effects["man → woman"]["pictures"] == 1
    assert report.figures["unread"] == 1
    assert list(report.tables[0].columns) == [
        "property", "woman → man", "images", "before", "man → woman", "images", "before",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "number"),
    [("7", 7), ("10.", 10), (" 8/10", 8), ("Three", 3), ("from 1 to 10 it is 7", None), ("none", None), ("11", None)],
)
def test_the_number_in_an_answer(text, number):
    assert number_in(text) == number


def test_a_change_in_each_direction(joint, shapes):
    """The first group loses its own queries and gains the other's, the second the other way round."""
    samples = swapped_scenes(2, 1, "red", "blue").list
    assert [sample.group for sample in samples] == ["first", "first", "second", "second"]
    for sample in samples:
        colors = [thing.name.split()[0] for thing in sample.things]
        there, absent = ("red", "blue") if sample.group == "first" else ("blue", "red")
        assert colors.count(there) == 1
        assert absent not in colors
    queries = (["a photo of a red object"], ["a photo of a blue object"])
    study = BiasTable("shapes", ("red", "blue"), queries, ["objects"], "how many objects are there?", size=0.2)
    for sample in (samples[0], samples[2]):
        (row,) = study.rows(shapes, sample)
        first = sample.group == "first"
        lower, higher = (joint.owl.embed_queries(one) for one in (queries if first else queries[::-1]))
        seen = joint.see(sample.image)
        changed = seen.with_tokens(signed_step(joint.owl, seen.vision, lower, higher, 0.2))
        for name, one in (("before", seen), ("after", changed)):
            said = joint.generate(one, "how many objects are there?", max_new_tokens=8).text
            assert row[name] == number_in(said)
    for wrong in (
        {"groups": ("a", "a")},
        {"queries": ([], ["b"])},
        {"properties": []},
        {"size": 0.0},
        {"way": "far"},
    ):
        given = {
            "joint": "shapes",
            "groups": ("a", "b"),
            "queries": queries,
            "properties": ["x"],
            "question": "{}?",
        } | wrong
        with pytest.raises(InputError):
            BiasTable(**given)


def test_images_without_objects_count(tmp_path):
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 8, "height": 8} for i in range(3)],
        "annotations": [{"image_id": 2, "category_id": 1, "segmentation": [[0, 0, 4, 0, 4, 4]]}],
        "categories": [{"id": 1, "name": "bear"}, {"id": 2, "name": "teddy bear"}],
    }
    (tmp_path / "o.json").write_text(json.dumps(content))
    assert [sample.name for sample in coco(tmp_path / "o.json", tmp_path).list] == ["2.png"]
    every = coco(tmp_path / "o.json", tmp_path, empty=True).list
    assert [(sample.name, len(sample.things)) for sample in every] == [("0.png", 0), ("1.png", 0), ("2.png", 1)]
    assert categories(tmp_path / "o.json") == ["bear", "teddy bear"]
    with pytest.raises(InputError, match="no such file"):
        categories(tmp_path / "gone.json")


@pytest.mark.parametrize("command", ["answers-and-boxes", "bias-table"])
def test_the_commands(run, tmp_path, command):
    options = {
        "answers-and-boxes": ["--count", "2"],
        "bias-table": ["--count", "1", "--group", "red", "--group", "blue"],
    }[command]
    code, out, err = run("joint", command, *options, "--out", tmp_path, "--json")
    assert code == 0, err
    assert json.loads(out)[command]["pictures"] == 2
    assert (tmp_path / command / "report.html").exists()
    code, _, err = run("joint", command, *options, "--images", tmp_path, "--out", tmp_path)
    assert code == 2
    assert "--masks" in err or "twice" in err
