"""docs/extending.md: each example, as printed, adds a thing that then works everywhere its kind is listed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import tiny
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

import mllm_fast as mf
from mllm_fast.context.registry import PRUNING_SCORES
from mllm_fast.core import registry
from mllm_fast.core.layout import Tile
from mllm_fast.core.plugins import load_plugins
from mllm_fast.evaluation.registry import EVALUATIONS
from mllm_fast.evaluation.studies.fidelity import Fidelity
from mllm_fast.explain import heatmap_method
from mllm_fast.explain.registry import HEATMAP_METHODS
from mllm_fast.models import Adapter
from mllm_fast.models.architectures import ARCHITECTURES

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
EXAMPLES = dict(re.findall(r"<!-- run: (\S+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))
QUESTION = "what color is the circle ?"


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """What a test adds is gone after it."""
    monkeypatch.setattr("mllm_fast.core.plugins._loaded", {})
    monkeypatch.setattr(sys, "path", [*sys.path])
    for one in (HEATMAP_METHODS, PRUNING_SCORES, EVALUATIONS, ARCHITECTURES):
        for name in one:  # the package's own register themselves once, when they are imported
            one.get(name)
        monkeypatch.setattr(one, "_modules", dict(one._modules))
        monkeypatch.setattr(one, "_found", dict(one._found))
    yield
    for name in EXAMPLES:
        sys.modules.pop(name.removesuffix(".py"), None)


@pytest.fixture
def example(tmp_path):
    def write(name: str) -> Path:
        path = tmp_path / name
        path.write_text(EXAMPLES[name])
        return path

    return write


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "mllm_fast.cli", *map(str, arguments)], capture_output=True, text=True, **options
    )


def test_a_heatmap_method(example, shapes, picture):
    load_plugins([str(example("last_layer.py"))])
    ex = shapes.explain(picture, "what color is the star?")
    expected = ex.layout.images[0].to_grid(ex.attention(0)[-1].mean(0)[ex.layout.images[0].positions])
    assert torch.equal(ex.heatmap(0, "last-layer"), expected)
    assert {one.method for one in ex.verify(method="last-layer")} == {"last-layer"}


def test_a_heatmap_method_on_the_command_line(example, tmp_path):
    """In help, in a page and in its caption; without the plugin it is refused."""
    plugin, page = example("last_layer.py"), tmp_path / "page.html"
    assert "last-layer" in command("--plugin", plugin, "explain", "--help").stdout
    done = command("--plugin", plugin, "explain", "--method", "last-layer", "--out", page, "--json")
    assert done.returncode == 0, done.stderr
    assert "attention of the last layer, mean over heads" in page.read_text()
    refused = command("explain", "--method", "last-layer")
    assert refused.returncode == 2
    assert "--method is one of logprob" in refused.stderr


def test_a_ninth_method_in_the_fidelity_evaluation(example, tmp_path):
    """Also where the rows are made by other processes; a folder of eight methods' rows is another run's."""
    folder = tmp_path / "out"
    plugin = example("last_layer.py")
    done = command(
        "--plugin", plugin, "eval", "fidelity", "--count", 2, "--processes", 2, "--out", folder, "--json", timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["fidelity"]["methods"]
    assert list(found)[-1] == "last-layer"
    assert len(found) == 9
    assert (folder / "fidelity" / "report.html").exists()
    load_plugins([str(plugin)])
    assert Fidelity().settings["added_methods"] == ["last-layer"]


def test_a_heatmap_method_in_the_tool_and_the_schema(example):
    plugin = example("last_layer.py")
    code = (
        "from mllm_fast.core.plugins import load_plugins; load_plugins([%r]);"
        "from mllm_fast.serving.schema import ExplanationRequest; from mllm_fast.serving.ui_parts import methods;"
        "print(ExplanationRequest.model_json_schema()['properties']['method']['enum'][-1], methods(False)[-1])"
    )
    done = subprocess.run([sys.executable, "-c", code % str(plugin)], capture_output=True, text=True)
    assert done.stdout.split(maxsplit=1) == [
        "last-layer",
        "('last-layer (attention of the last layer, mean over heads)', 'last-layer')\n",
    ], done.stderr


def test_a_pruning_score(example, shapes, picture, tmp_path):
    load_plugins([str(example("value_norm.py"))])
    ctx = shapes.compress(picture, keep=5, score="value_norm")
    whole = shapes.compress(picture, keep=1.0, score="value_norm")
    image = whole.layout.positions("image")
    for layer in range(len(ctx.keys)):
        best = image[whole.values[layer].norm(dim=-1).mean(0)[image].topk(5).indices].sort().values
        assert torch.equal(ctx.kept(layer).positions, best)
    ctx.save(tmp_path / "a.safetensors")
    assert mf.Context.load(tmp_path / "a.safetensors", shapes).settings["score"] == "value_norm"


def test_a_pruning_score_on_the_command_line(example, tmp_path):
    plugin, out = example("value_norm.py"), tmp_path / "a.safetensors"
    assert (
        "value_norm" in command("compress", "--help", env={"MLLM_FAST_PLUGINS": str(plugin), "COLUMNS": "200"}).stdout
    )
    done = command("--plugin", plugin, "compress", "--score", "value_norm", "--out", out)
    assert done.returncode == 0, done.stderr
    assert out.exists()


def test_an_evaluation(example, tmp_path):
    plugin = example("answer_length.py")
    arguments = ("--plugin", plugin, "eval", "answer-length", "--count", 3, "--out", tmp_path / "out", "--json")
    done = command(*arguments, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["answer-length"]["tokens"] > 1


class AcmeConfig(LlavaConfig):
    model_type = "acme_llava"


class AcmeModel(LlavaForConditionalGeneration):
    config_class = AcmeConfig


def acme():
    """A model of a type that nobody has heard of, with the tiny LLaVA's processor."""
    like, processor = tiny.llava()
    torch.manual_seed(3)
    config = AcmeConfig(**{**like.config.to_dict(), "model_type": "acme_llava"})
    return AcmeModel(config).eval(), processor


def test_an_architecture(example, picture):
    """Only heatmaps need to be told how image tokens lie."""
    model, processor = acme()
    unknown = mf.VLM(model, processor)
    scores = unknown.explain(picture, QUESTION, "red blue")
    with pytest.raises(mf.InputError, match=r"is not known, so heatmaps.*docs/extending.md"):
        scores.heatmap(0)
    with pytest.raises(mf.InputError, match="heatmaps"):
        unknown.compress(picture, keep=5, score="query").kept(0)
    load_plugins([str(example("acme_llava.py"))])
    vlm = mf.VLM(model, processor)
    ex = vlm.explain(picture, QUESTION, "red blue")
    assert torch.equal(ex.head_scores, scores.head_scores)
    inputs, _ = vlm.prepare(picture, QUESTION)
    ids = ex.input_ids[None, :-1]
    with tiny.eager(model), torch.no_grad():
        own = model(input_ids=ids, pixel_values=inputs["pixel_values"], output_attentions=True).attentions
    attention = torch.stack([layer[0, :, -1] for layer in own])
    torch.testing.assert_close(ex.attention(-1)[..., : attention.shape[-1]], attention, rtol=1e-4, atol=1e-6)
    assert ex.heatmap(0).shape == ex.layout.images[0].grid == (4, 4)
    closed = vlm.generate(picture, QUESTION, knockout=mf.Knockout("image", "query+generated"), max_new_tokens=4)
    assert len(closed.token_ids) > 0


def test_an_adapter_that_is_given(picture, tmp_path):
    model, processor = tiny.llava()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")

    class Mine(Adapter):
        def tiles(self, processor, inputs, index, size):
            return (Tile(2, 8, (0.0, 0.0, 1.0, 1.0)),), (1, 1)

    vlm = mf.VLM.from_pretrained(tmp_path / "model", device="cpu", adapter=Mine)
    assert vlm.explain(picture, QUESTION, "red").heatmap(0).shape == (2, 8)
    assert "Mine" not in {type(ARCHITECTURES.get(name)).__name__ for name in ARCHITECTURES}


def test_an_entry_point(example, shapes, picture, monkeypatch):
    """Listed without being loaded, loaded when it is asked for."""
    monkeypatch.syspath_prepend(example("last_layer.py").parent)
    offered = EntryPoint("last-layer", "last_layer", "mllm_fast.heatmaps")
    wrong = EntryPoint("other", "last_layer", "mllm_fast.heatmaps")
    monkeypatch.setattr(registry, "_offered", lambda group: (offered, wrong) if group == offered.group else ())
    assert HEATMAP_METHODS.names()[-2:] == ("last-layer", "other")
    assert "last_layer" not in sys.modules
    ex = shapes.explain(picture, "what color is the star?")
    assert ex.heatmap(0, "last-layer").shape == ex.layout.images[0].grid
    with pytest.raises(mf.InputError, match="registers none so named"):
        ex.heatmap(0, "other")


@pytest.mark.parametrize(
    ("name", "message"),
    [("tam", "there is a heatmap method 'tam' already"), ("My Map", "lower-case letters"), ("", "lower-case letters")],
)
def test_names_that_cannot_be_taken(name, message):
    with pytest.raises(mf.InputError, match=message):
        heatmap_method(name, "nothing")(lambda *_: torch.zeros(1))


def test_what_a_method_gives_is_checked(shapes, picture):
    heatmap_method("short", "too few numbers")(lambda *_: torch.zeros(3))
    ex = shapes.explain(picture, "what color is the star?")
    with pytest.raises(mf.InputError, match=r"'short' gives one number for an image token.*got \(3,\)"):
        ex.heatmap(0, "short")
    heatmap_method("row", "too few positions", every_position=True)(lambda *_: torch.zeros(3))
    with pytest.raises(
        mf.InputError, match=r"'row' gives one number for every position up to .*at least \[\d+\]; got \(3,\)"
    ):
        ex.heatmap(0, "row")


def test_plugins_that_cannot_be_loaded(tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "json.py").write_text("")
    for name, message in (
        (tmp_path / "gone.py", "is not there"),
        (tmp_path / "broken.py", "division by zero"),
        (tmp_path / "json.py", "name of another module"),
        ("no_such_module", "cannot be imported"),
    ):
        with pytest.raises(mf.InputError, match=message):
            load_plugins([str(name)])
    done = command("--plugin", tmp_path / "gone.py", "info")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mllm-fast: the plugin ")


def test_an_old_name_of_a_score(shapes, picture):
    """For one release, with a warning; a store of before is found again."""
    with pytest.warns(DeprecationWarning, match="called 'key_norm' now"):
        old = shapes.compress(picture, keep=5, score="norm")
    new = shapes.compress(picture, keep=5, score="key_norm")
    assert torch.equal(old.positions, new.positions)
    store = mf.ContextStore()
    keys = {store.key(shapes, [picture], {"prompt": "a", "score": score}) for score in ("norm", "key_norm")}
    assert len(keys) == 1
