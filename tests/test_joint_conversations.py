"""Conversations side by side, and the portraits of a table of biases."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from mllm_fast.core.errors import InputError
from mllm_fast.evaluation.joint import portraits
from mllm_fast.evaluation.joint.conversations import (
    GIVEN,
    JOINT,
    OWN,
    Conversations,
    llava_conversations,
    scene_conversations,
)
from mllm_fast.joint import JointModel
from mllm_fast.shapes.evaluate import Asker


def test_each_model_goes_on_from_its_own_answers(shapes):
    """The language model alone as by the chat template and `generate`; through W as `JointModel` says."""
    sample = scene_conversations(1, 3).list[0]
    assert len(sample.turns) == 3
    rows = Conversations("shapes", 32).rows(shapes, sample)
    chat: list[str] = []
    for row, (question, given) in zip(rows, sample.turns, strict=True):
        assert (row["question"], row[GIVEN]) == (question, given)
        chat.append(question)
        assert row[OWN] == Asker(shapes.model, shapes.processor)([sample.scene], [chat])[0]
        chat.append(row[OWN])
    joint = JointModel.from_pretrained("shapes", vlm=shapes)
    assert rows[0][JOINT] == joint.generate(sample.image, sample.turns[0][0]).text
    report = Conversations("shapes").report({"a": rows, "b": [{"question": "q", GIVEN: "a b", OWN: "a", JOINT: "b"}]})
    turns = [*rows, {GIVEN: "a b", OWN: "a", JOINT: "b"}]
    assert report.figures["same"] == pytest.approx(sum(row[OWN] == row[JOINT] for row in turns) / 4)
    assert report.tables[2].rows == [["q", "a b", "a", "b"]]
    one = Conversations("shapes").report({"b": [{"question": "q", GIVEN: "a b", OWN: "a", JOINT: "a b"}]})
    assert one.figures["f1"] == {OWN: pytest.approx(2 / 3), JOINT: 1}


def test_the_published_format(tmp_path):
    entry = {
        "id": "1",
        "image": "a.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A dog."},
            {"from": "human", "value": "Its color?"},
            {"from": "gpt", "value": "Brown."},
        ],
    }
    odd = {**entry, "id": "2", "conversations": entry["conversations"][:3]}
    (tmp_path / "c.json").write_text(json.dumps([entry, odd, entry]))
    first, second = llava_conversations(tmp_path / "c.json", tmp_path, 2).list
    assert first.turns == (("What is it?", "A dog."), ("Its color?", "Brown."))
    assert (first.source, first.problem) == (tmp_path / "a.jpg", "")
    assert "do not go in pairs" in second.problem
    for content, why in (("{", "not in LLaVA-Instruct's"), ("[]", "no conversation"), ('[{"id": 1}]', "not in LLaVA")):
        (tmp_path / "c.json").write_text(content)
        with pytest.raises(InputError, match=why):
            llava_conversations(tmp_path / "c.json", tmp_path)
    with pytest.raises(InputError, match="no such file"):
        llava_conversations(tmp_path / "gone.json", tmp_path)


def test_the_command(run, tmp_path):
    code, out, err = run("joint", "conversations", "--count", "2", "--out", tmp_path, "--json")
    assert code == 0, err
    assert json.loads(out)["conversations"]["turns"] == 6
    code, _, err = run("joint", "conversations", "--images", tmp_path)
    assert code == 2
    assert "--data" in err


class Pipeline:
    """Stands for diffusers, which is no dependency: a colour that depends on the prompt and the generator."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompt, generator, **options):
        self.calls.append((prompt, generator.initial_seed(), options))
        shade = int(torch.randint(0, 256, (1,), generator=generator))
        return type("Output", (), {"images": [Image.new("RGB", (4, 4), (shade, len(prompt) % 256, 0))]})


def test_portraits_have_the_same_seeds_in_each_group(tmp_path):
    prompts = portraits.read_prompts(portraits.PROMPTS)["gender"]
    pipeline = Pipeline()
    paths = portraits.make_portraits(pipeline, prompts, tmp_path, 2, 3, seed=7)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        *("woman/portrait_000.png", "woman/portrait_001.png"),
        *("man/portrait_000.png", "man/portrait_001.png"),
    ]
    assert [seed for _, seed, _ in pipeline.calls] == [7, 8, 7, 8]
    assert pipeline.calls[0][0] == prompts["woman"]
    assert pipeline.calls[0][2] == {"num_inference_steps": 3, "negative_prompt": prompts["negative"]}
    portraits.make_portraits(pipeline, prompts, tmp_path, 3, 3, seed=7)
    assert [seed for _, seed, _ in pipeline.calls[4:]] == [9, 9]  # those that are there stay
    base, refiner = Pipeline(), Pipeline()
    portraits.make_portraits(base, prompts, tmp_path / "refined", 1, 50, refiner=refiner)
    assert base.calls[0][2]["denoising_end"] == refiner.calls[0][2]["denoising_start"] == 0.8


@pytest.mark.parametrize("text", [None, "{", '{"a": {"b": "c"}}', '{"a": {"b": "c", "d": 1}}'])
def test_files_that_hold_no_prompts(tmp_path, text):
    if text is not None:
        (tmp_path / "p.json").write_text(text)
    with pytest.raises(InputError):
        portraits.read_prompts(tmp_path / "p.json")


@pytest.mark.parametrize("options", [["--topic", "age"], ["--count", "0"]])
def test_options_that_make_no_portraits(tmp_path, options, capsys):
    with pytest.raises(SystemExit) as stopped:
        portraits.main(["--model", "x", "--out", str(tmp_path), *options])
    assert stopped.value.code == 2
    assert "error" in capsys.readouterr().err
