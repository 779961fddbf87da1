"""Knockouts and checks on the command line: what is printed and written; bad input ends in one line and code 2."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from mllm_fast.knockout.attention_share import TYPES

SHOWN = [name for name in TYPES if name != "image_separator"]  # the embedded model has no separators


def test_the_three_configurations(run, tmp_path):
    target = tmp_path / "chart.png"
    code, out, err = run("knockout", "--out", target)
    assert code == 0, err
    for label in ("nothing", "image->generated", "image->query", "image->query+generated", *SHOWN):
        assert label in out
    with Image.open(target) as image:
        assert image.width > image.height > 300


def test_json_of_own_rules(run):
    code, out, _ = run("knockout", "--block", "image->query@from 3", "--block", "image->generated", "--json")
    assert code == 0
    result = json.loads(out)
    assert [a["knocked_out"] for a in result["answers"]] == ["nothing", "image->query@from 3 and image->generated"]
    share = result["answers"][1]["attention_share"]
    assert set(share) == set(SHOWN)
    for layer, heads in enumerate(share["image"]):
        assert heads == [0.0] * len(heads), f"layer {layer}: generated tokens may not see the image"
    assert max(max(heads) for heads in result["answers"][0]["attention_share"]["image"]) > 0.5


def test_generate_and_explain_under_a_knockout(run):
    plain = run("generate")[1]
    code, out, err = run("generate", "--block", "image->query+generated")
    assert code == 0, err
    assert out != plain, "without the image the model cannot know"
    code, out, _ = run("explain", "--block", "image->query", "--layers", "from 2", "--json")
    assert code == 0
    assert json.loads(out)["tokens"]


def test_verify_is_shown_everywhere(run, tmp_path):
    code, out, err = run("explain", "--verify")
    assert code == 0, err
    assert "check" in out
    assert "holds" in out
    page = tmp_path / "page.html"
    code, out, _ = run("explain", "--verify", "--json", "--out", page)
    (token,) = json.loads(out)["tokens"]
    assert token["verification"]["verdict"] == "holds"
    assert token["verification"]["change"]["highest"] < min(token["verification"]["change"]["random"])
    assert "the map holds" in page.read_text()


def test_the_table_follows_the_method(run):
    """Its best patch and its check are those of the map that was asked for, and it says so."""
    _, plain, _ = run("explain")
    code, out, err = run("explain", "--method", "rollout", "--verify")
    assert code == 0, err
    assert "best patch, pixels" in plain
    assert "'rollout'" in out
    assert "holds" not in out
    (default,), (other,) = (re.findall(r"x \d+-\d+, y \d+-\d+", text) for text in (plain, out))
    assert default != other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--block", "image>query"], "source->target"),
        (["generate", "--block", "dog->query"], "'dog'"),
        (["generate", "--block", "image->image"], "from itself"),
        (["generate", "--block", "image->query@from 9"], "layers 0 to 5"),
        (["generate", "--block", "image->query", "--layers", "some"], "layers are numbers"),
        (["explain", "--block", "3->2->1"], "'2->1'"),
        (["generate", "--backend", "fast"], "backend is one of"),
        (["generate", "--backend", "triton"], "cannot be used"),
        (["knockout", "--out", "chart.bmp"], "ending is one of"),
        (["knockout", "--out", "nowhere/chart.png"], "does not exist"),
    ],
)
def test_bad_input(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())
