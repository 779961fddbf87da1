"""compress, ask and kept on the command line: what is printed and written; bad input ends in one line and code 2."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from mllm_fast.core.assets import SAMPLE

QUESTION = "What color is the star?"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A context of the sample image."""
    import mllm_fast as mf

    path = tmp_path_factory.mktemp("made") / "photo.safetensors"
    mf.VLM.from_pretrained("shapes", device="cpu").compress(SAMPLE, keep=0.2).save(path)
    return path


def test_compress_tells_what_it_kept(run, tmp_path):
    path = tmp_path / "a.safetensors"
    code, out, err = run("compress", "--keep", "10%", "--out", path, "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["image_tokens_kept"] == 15
    assert facts["image_tokens"] == 144
    assert facts["bytes"] < facts["uncompressed_bytes"] < facts["peak_bytes"]
    assert facts["file_bytes"] == path.stat().st_size
    assert "star" in facts["description"]
    code, out, _ = run("compress", "--keep", "7", "--score", "query", "--storage", "int8", "--out", path)
    assert code == 0
    assert "7 of 144 a layer" in out
    assert "int8 error" in out
    assert "reply" not in out


def test_one_question_prints_the_answer_alone(run, made):
    code, out, err = run("ask", made, QUESTION)
    assert (code, out) == (0, "blue\n"), err


def test_several_questions_however_they_come(run, made, tmp_path, monkeypatch):
    questions = [QUESTION, "how many objects are there?"]
    expected = [f"{QUESTION}\tblue", f"{questions[1]}\tfour"]
    assert run("ask", made, *questions)[1].splitlines() == expected
    listed = tmp_path / "questions.txt"
    listed.write_bytes(f"\ufeff{QUESTION}\r\n\r\n{questions[1]}\r\n".encode())
    assert run("ask", made, "--questions", listed)[1].splitlines() == expected
    assert json.loads(run("ask", made, *questions, "--json")[1])[1] == {
        "question": questions[1],
        "answer": "four",
        "finish_reason": "stop",
    }
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(questions)))
    assert run("ask", made)[1].splitlines() == expected


def test_a_conversation(run, made, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(f"{QUESTION}\n\udce9\nhow many objects are there?\n\nmore\n"))
    code, out, err = run("ask", made)
    assert code == 0
    assert out.split() == ["blue", "four"]
    assert "not valid Unicode" in err


def test_kept_is_shown_and_drawn(run, made, tmp_path):
    target = tmp_path / "kept.png"
    code, out, err = run("kept", made, "--image", SAMPLE, "--out", target)
    assert code == 0, err
    assert "29 of 144 image tokens a layer" in out
    with Image.open(target) as image:
        drawn = np.asarray(image.convert("RGB")).astype(int)
    assert (np.ptp(drawn.reshape(-1, 3), 0) > 200).all(), "the image's colours are in it"
    facts = json.loads(run("kept", made, "--json")[1])
    assert len(facts["layers"]) == 6
    for layer in facts["layers"]:
        assert len(layer["positions"]) == len(layer["boxes"]) == 29
    grey = tmp_path / "grey.png"
    assert run("kept", made, "--out", grey)[0] == 0
    assert grey.read_bytes() != target.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "--keep", "0"], "keep, as a count, is at least 1, got 0"),
        (["compress", "--keep", "0%"], "keep, as a share, is above 0 and at most 1.0, got 0.0"),
        (["compress", "--keep", "150%"], "at most 1.0, got 1.5"),
        (["compress", "--keep", "nan"], "at most 1.0, got nan"),
        (["compress", "--keep", "145"], "1 to the image's 144 tokens, got 145"),
        (["compress", "--keep", "few"], "keep is a share (0.05, 5%) or a count (29), got 'few'"),
        (["compress", "--score", "best"], "score is one of generated, query, key_norm, random, got 'best'"),
        (["compress", "--parts", "all"], "parts is one of query+image, query, image, got 'all'"),
        (["compress", "--storage", "zip"], "--storage is one of full, int8, got 'zip'"),
        (["compress", "--out", "a.pt"], "ending is one of .safetensors, got '.pt'"),
        (["compress", "nothing.png"], "nothing.png"),
        (["ask", "gone.safetensors", "what?"], "there is no such file; mllm-fast compress makes one"),
        (["ask", "MADE", " "], "the question is empty"),
        (["ask", "MADE", "red " * 2000], "the model's window is 1024"),
        (["ask", "MADE", "red?", "--max-new-tokens", "2000"], "the model's window is 1024"),
        (["ask", "MADE", "red?", "--batch-size", "0"], "batch_size is at least 1, got 0"),
        (["ask", "MADE", "--questions", "EMPTY"], "there is no question in it"),
        (["ask", "MADE", "--questions", "LATIN"], "is not UTF-8 text"),
        (["kept", "MADE", "--out", "a.svg"], "ending is one of .png, got '.svg'"),
        (["kept", "MADE", "--image", "SMALL"], "was made of other images"),
        (["ask", "PICTURE", "red?"], "no context file"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(run, made, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"\xe4 red?\n")
    Image.new("RGB", (10, 20)).save(tmp_path / "small.png")
    named = {"MADE": made, "EMPTY": "empty.txt", "LATIN": "latin.txt", "SMALL": "small.png", "PICTURE": SAMPLE}
    before = sorted(tmp_path.iterdir())
    code, out, err = run(*(named.get(argument, argument) for argument in arguments))
    assert code == 2
    assert out == ""
    assert err.startswith("mllm-fast: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted(tmp_path.iterdir()) == before
