"""The user study of arXiv 2405.14612: its page, its key, and what the readers' answers come to."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from mllm_fast.core.errors import InputError
from mllm_fast.evaluation.joint.study import (
    read_answers,
    read_key,
    study_key,
    study_page,
    study_questions,
    study_report,
)
from mllm_fast.evaluation.samples import Samples, scenes
from mllm_fast.joint import JointModel

KEY = [
    {"image": "a", "things": ["dog", "cat"], "first": "dog"},
    {"image": "b", "things": ["cup", "hat"], "first": "hat"},
]


@pytest.fixture(scope="module")
def joint(shapes):
    return JointModel.from_pretrained("shapes", vlm=shapes)


@pytest.fixture(scope="module")
def questions(joint):
    return study_questions(joint, scenes(6, 2), 3, 1, "Describe the image.", "a {}")


def test_the_maps_are_those_of_the_things(joint, questions):
    """The first map is that of the thing that the key names, the second the other's; the paper's map of pixels."""
    samples = {sample.name: sample for sample in scenes(6, 2).list}
    more = study_questions(joint, scenes(12, 2), 8, 1, "Describe the image.", "a {}")
    assert {question.first for question in more} == {0, 1}
    for question in questions:
        sample = samples[question.image]
        assert set(question.things) <= {thing.name for thing in sample.things}
        for place, which in ((1, question.first), (2, 1 - question.first)):
            name = question.things[which]
            ex = joint.explain(sample.image, "Describe the image.", f"a {name}")
            token = len(ex.tokens) - 1
            assert ex.tokens[token].strip() == name.split()[-1]
            values = ex.box_weights(token, f"a photo of a {name}").pixels().numpy()
            drawn = np.asarray(question.pictures[place].resize((96, 96), Image.Resampling.BOX), float)
            plain = np.asarray(sample.image.convert("RGB"), float)
            strong = values > 0.9 * values.max()
            weak = values < 0.05 * values.max()
            change = np.abs(drawn - plain).mean(-1)
            assert change[strong].mean() > change[weak].mean()


def test_the_page_shows_no_key(questions):
    page = study_page(questions)
    shown = json.loads(re.search(r"const questions = (.*);\n", page)[1])
    assert [one["things"] for one in shown] == [list(question.things) for question in questions]
    assert all(set(one) == {"things", "pictures"} for one in shown)
    assert len(shown[0]["pictures"]) == 3
    data = shown[0]["pictures"][0].removeprefix("data:image/png;base64,")
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.size == (96, 96)
    assert page.count("</script>") == 1
    assert not re.search(r"(src|href)\s*=\s*[\"']?http", page)
    key = json.loads(study_key(questions))
    assert [one["first"] for one in key] == [question.things[question.first] for question in questions]


def test_right_answers_by_hand():
    answers = {"1": {1: "dog", 2: "hat"}, "2": {1: "cat", 2: "hat"}, "3": {1: "dog"}}
    figures = study_report(KEY, answers).figures
    assert figures["questions"] == [{"right": pytest.approx(2 / 3), "answers": 3}, {"right": 1, "answers": 2}]
    assert figures["right"] == pytest.approx(4 / 5)
    assert figures["readers"] == 3
    assert figures["interval"] == pytest.approx((0.37553, 0.96379), abs=1e-4)  # Wilson's, of 4 in 5


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("participant,question\n1,1\n", "no column answer"),
        ("participant,question,answer\n1,3,dog\n", "line 2: questions are 1 to 2, got '3'"),
        ("participant,question,answer\n", "no answer"),
        (None, "no such file"),
    ],
)
def test_answers_that_cannot_be_read(tmp_path, text, why):
    if text is not None:
        (tmp_path / "a.csv").write_text(text)
    with pytest.raises(InputError, match=why):
        read_answers([tmp_path / "a.csv"], 2)


@pytest.mark.parametrize("text", [None, "{", "[]", '[{"image": "a", "things": ["b"], "first": "c"}]'])
def test_files_that_are_no_key(tmp_path, text):
    if text is not None:
        (tmp_path / "k.json").write_text(text)
    with pytest.raises(InputError, match=r"no such file|no key"):
        read_key(tmp_path / "k.json")


def test_the_command(run, tmp_path):
    code, out, err = run("joint", "study", "--count", "2", "--out", tmp_path / "s", "--json")
    assert code == 0, err
    assert json.loads(out)["questions"] == 2
    key = read_key(tmp_path / "s" / "key.json")
    (tmp_path / "a.csv").write_text(
        "participant,question,answer\n" + "".join(f"1,{i},{one['first']}\n" for i, one in enumerate(key, 1))
    )
    options = ["--key", tmp_path / "s" / "key.json", "--answers", tmp_path / "a.csv", "--out", tmp_path / "r"]
    code, out, err = run("joint", "study", *options, "--json")
    assert code == 0, err
    assert json.loads(out)["study"]["right"] == 1
    for wrong in (options[:2], ["--count", "0"], ["--images", tmp_path]):
        code, _, _ = run("joint", "study", *wrong, "--out", tmp_path / "x")
        assert code == 2


def test_too_few_images(joint):
    with pytest.raises(InputError, match="0 of 1 images show two things"):
        study_questions(joint, one_thing(), 1)


def one_thing() -> Samples:
    sample = scenes(1).list[0]
    return Samples([type(sample)(sample.name, sample.source, sample.things[:1])], {})
