"""The command line: what it prints, what it writes, and that bad input ends in one line and code 2."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from mllm_fast.models.loading import model_folder

WEIGHTS = Path(model_folder("shapes"))


@pytest.fixture
def png(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(path)
    return path


def test_explain_the_sample(run, tmp_path):
    target = tmp_path / "star.png"
    code, out, err = run("explain", "--out", target)
    assert code == 0, err
    assert "What color is the star?" in out
    assert "saved" in out
    with Image.open(target) as image:
        image.verify()


def test_json_is_all_of_stdout(run):
    code, out, _ = run("explain", "--question", "Describe the image.", "--json")
    assert code == 0
    result = json.loads(out)
    assert result["answer"].startswith("a ")
    assert len(result["tokens"][0]["top_heads"]) == 10


def test_generate(run, png):
    code, out, _ = run("generate", png, "-q", "How many objects are there?", "--json")
    assert code == 0
    assert json.loads(out)["question"] == "How many objects are there?"
    code, out, _ = run("generate")
    assert code == 0
    assert len(out.split()) == 1


def test_one_word_of_an_answer(run, tmp_path):
    code, out, _ = run("explain", "-q", "Describe the image.", "--answer", "a red star", "--token", "star")
    assert code == 0
    assert " star " in out
    code, _, err = run("explain", "--token", "dog")
    assert code == 2
    assert "is not in the answer" in err


def test_info(run):
    code, out, _ = run("info", "--json")
    assert code == 0
    facts = json.loads(out)
    assert torch.__version__.startswith(facts["versions"]["torch"])  # without "+cu130"
    assert "logprob_increase" in facts["operations"]
    code, out, _ = run("info")
    assert code == 0
    assert "architectures" in out


def bomb(path):
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)))
    return path


def folder_without(tmp_path, name):
    shutil.copytree(WEIGHTS, tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    return tmp_path / "model"


def damaged_weights(tmp_path):
    shutil.copytree(WEIGHTS, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    return tmp_path / "model"


def rewritten(tmp_path, name, text):
    shutil.copytree(WEIGHTS, tmp_path / "model")
    (tmp_path / "model" / name).write_text(text)
    return tmp_path / "model"


def text_only(tmp_path):
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(WEIGHTS / name, tmp_path / "model")
    return tmp_path / "model"


def unlisted(tmp_path):
    shutil.copytree(WEIGHTS, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"model_type": "llava"', '"model_type": "paligemma"'))
    return tmp_path / "model"


BAD = {
    "no such file": (lambda t: ["explain", t / "none.png"], "no such file"),
    "not an image": (lambda t: ["explain", Path(__file__)], "not an image"),
    "empty file": (lambda t: ["explain", (t / "e.png").touch() or t / "e.png"], "is empty"),
    "too large": (lambda t: ["explain", bomb(t / "b.png")], "--max-pixels"),
    "empty prompt": (lambda t: ["explain", "-q", "  "], "prompt is empty"),
    "placeholder": (lambda t: ["explain", "--raw", "-q", "what is <image> ?"], "placeholder"),
    "empty answer": (lambda t: ["explain", "--answer", " "], "answer to be explained is empty"),
    "norm": (lambda t: ["explain", "--norm", "none"], "norm is"),
    "tokens": (lambda t: ["explain", "--max-new-tokens", "0"], "at least 1"),
    "index": (lambda t: ["explain", "--token", "7"], "index is 0 to"),
    "model folder": (lambda t: ["explain", "--model", t / "none"], "no such model folder"),
    "no config": (lambda t: ["explain", "--model", folder_without(t, "config.json")], "no config.json"),
    "no weights": (lambda t: ["explain", "--model", folder_without(t, "model.safetensors")], "no weights"),
    "no processor": (lambda t: ["explain", "--model", folder_without(t, "processor_config.json")], "no processor"),
    "no tokenizer": (lambda t: ["explain", "--model", folder_without(t, "tokenizer.json")], "no tokenizer"),
    "damaged weights": (lambda t: ["explain", "--model", damaged_weights(t)], "cannot be loaded"),
    "text-only": (lambda t: ["explain", "--model", text_only(t)], "no vision part"),
    "unlisted": (lambda t: ["explain", "--model", unlisted(t)], "cannot be loaded"),
    "GPU": (lambda t: ["explain", "--device", "cuda:99"], "--device cpu"),
    "device": (lambda t: ["explain", "--device", "gpu"], "device is"),
    "dtype": (lambda t: ["explain", "--dtype", "int4"], "dtype is one of"),
    "ending": (lambda t: ["explain", "--out", t / "x.bmp"], "ending is one of"),
    "target folder": (lambda t: ["explain", "--out", t / "no" / "x.png"], "does not exist"),
    "folder": (lambda t: ["explain", t], "no such file"),
    "long name": (lambda t: ["explain", "x" * 300], "File name too long"),
    "surrogates": (lambda t: ["explain", "-q", "what \udce9 is"], "not valid Unicode"),
    "odd index": (lambda t: ["explain", "--token", "\u00b2"], "is not in the answer"),
    "limit": (lambda t: ["explain", "--max-pixels", "-1"], "the limit is -1"),
    "config": (lambda t: ["explain", "--model", rewritten(t, "config.json", "[]")], "config.json"),
    "no vision": (
        lambda t: ["explain", "--model", rewritten(t, "config.json", '{"model_type": "llava"}')],
        "vision part",
    ),
    "template": (
        lambda t: ["explain", "--model", rewritten(t, "chat_template.jinja", "{% for %}")],
        "processor cannot",
    ),
    "option": (lambda t: ["explain", "--fast"], "No such option"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(run, tmp_path, case):
    """One line that says what to do, code 2, no traceback, nothing on stdout, no file written."""
    make, message = BAD[case]
    arguments = make(tmp_path)
    if "--out" not in arguments:
        arguments += ["--out", tmp_path / "out.png"]
    code, out, err = run(*arguments)
    assert code == 2, (out, err)
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    if case != "option":  # typer's own usage message has a frame
        assert len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "out.png").exists()


def test_what_was_found_in_a_model(run):
    """The parts of the embedded model, and what works with it, each tried."""
    code, out, err = run("info", "--model", "shapes", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert (facts["type"], facts["layers"], len(facts["attention"])) == ("llava", 6, 6)
    assert facts["attention"][0]["output projection"].endswith("layers.0.self_attn.o_proj")
    assert facts["features"] == dict.fromkeys(
        ("generate", "explain", "heatmap", "verify", "knockout", "compress"), "works"
    )
    code, out, err = run("info", "--model", "shapes")
    assert code == 0, err
    assert "6, 6 of them with attention" in out


def test_lenses(run, tmp_path):
    """A patch's words layer by layer, and what a head writes, with the ranks of chosen words."""
    code, out, _ = run(
        "explain", "--lens", "all@60,40", "--lens", "3.1", "--lens", "2.mlp@5", "--words", "red,blue", "--json"
    )
    assert code == 0
    result = json.loads(out)
    whole = [row for row in result["lens"] if row["lens"] == "all@60,40"]
    assert [row["layer"] for row in whole] == list(range(len(whole)))
    assert len({row["position"] for row in whole}) == 1
    assert all(len(row["words"]) == 5 and set(row["ranks"]) == {"red", "blue"} for row in result["lens"])
    head, mlp = result["lens"][len(whole) :]
    assert (head["part"], head["position"], mlp["part"], mlp["position"]) == (1, None, "mlp", 5)
    _, out, _ = run("explain", "--lens", "all@60,40")
    assert "residual stream before it, position" in out
    bad = {"3.ffn": "a lens is", "all@900,900": "no image token lies at pixel 900,900", "99": "layer is 0"}
    for lens, message in bad.items():
        code, _, err = run("explain", "--lens", lens)
        assert code == 2
        assert message in err
