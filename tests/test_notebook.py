"""What a notebook shows: HTML, pictures, plots, tables; texts as on the command line; what files were made with."""

from __future__ import annotations

import copy
import json
import pickle
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from mllm_fast import InputError, Knockout
from mllm_fast.core.assets import SAMPLE
from mllm_fast.core.keep import parse_keep
from mllm_fast.explain.verification import Verification

QUESTION = "Describe the image."


class Closed(HTMLParser):
    """Reads HTML, and fails if an element is not closed."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.names, self.said = [], [], ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said += data + " "


@pytest.fixture(scope="module")
def ex(shapes):
    return shapes.explain(SAMPLE, QUESTION)


@pytest.fixture(scope="module")
def ctx(shapes):
    return shapes.compress(SAMPLE, keep="5%")


def test_each_object_is_one_line_and_html(shapes, ex, ctx):
    answer = shapes.generate(SAMPLE, QUESTION, attention_share=True)
    with shapes.stream(SAMPLE, QUESTION, explain=True) as stream:
        step = next(stream)
    plain = next(shapes.stream(SAMPLE, QUESTION))
    checked = ex.verify(tokens=[0])[0]
    shown = [
        (shapes, ["shapes", "LlavaForConditionalGeneration", "float32"]),
        (answer, [answer.text, "attention to image"]),
        (ex, [QUESTION, ex.text]),
        (step, [step.token.strip()]),
        (plain, [plain.token.strip(), "answer so far"]),
        (ctx, [QUESTION, "keep: 0.05"]),
        (ctx.kept(0), ["position", str(int(ctx.kept(0).positions[0]))]),
        (Knockout("image", "query", "from 4"), ["do not attend to", "from 4"]),
        (checked, [checked.verdict]),
    ]
    for one, words in shown:
        assert "\n" not in repr(one)
        said = Closed(one._repr_html_()).said
        assert all(word in said for word in words), (said, words)


def test_html_is_escaped(shapes):
    page = shapes.generate(SAMPLE, "What color is the <b>star</b>?")._repr_html_()
    assert "<b>" not in page
    assert "&lt;i&gt;" in shapes.explain(SAMPLE, "<i>", "blue")._repr_html_()


def test_long_explanations_are_a_table(shapes):
    ex = shapes.explain(SAMPLE, QUESTION, "a red star, " * 20)
    found = Closed(ex._repr_html_())
    assert "img" not in found.names
    assert f"and {len(ex.tokens) - 64} more tokens" in found.said


def test_pictures_are_those_of_the_files(ex, ctx, tmp_path):
    ex.save(tmp_path / "all.png")
    ex.save(tmp_path / "one.png", token=1)
    for name, image in (("all", ex.image()), ("one", ex.image(1))):
        with Image.open(tmp_path / f"{name}.png") as saved:
            assert np.array_equal(np.asarray(saved), np.asarray(image))
    assert ctx.image().size[0] > 200


def test_plots_draw_into_given_axes(shapes, ex, ctx):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn = [ex.plot, ctx.plot, shapes.generate(SAMPLE, QUESTION, attention_share=True).plot]
    with shapes.stream(SAMPLE, QUESTION, explain=True) as stream:
        drawn.append(next(stream).plot)
    axes = Figure().subplots(1, 4)
    for ax, draw in zip(axes, drawn, strict=True):
        assert draw(ax=ax) is ax
        assert ax.has_data()
    assert axes[0].get_title() == ex.labels[0]
    with pytest.raises(InputError, match="attention_share=True"):
        shapes.generate(SAMPLE, QUESTION).plot()


def test_tables_hold_the_numbers(shapes, ex, ctx):
    pytest.importorskip("pandas")
    table = ex.to_frame()
    assert len(table) == ex.head_scores.numel()
    best = table[table.token == 2].nlargest(3, "score")
    assert list(zip(best.layer, best["head"], strict=True)) == [(one, head) for one, head, _ in ex.top_heads(2, 3)]
    kept = ctx.to_frame()
    assert kept[kept.layer == 1].position.tolist() == ctx.kept(1).positions.tolist()
    assert ctx.kept(1).to_frame().shape == (len(ctx.kept(1).positions), 6)
    answer = shapes.generate(SAMPLE, QUESTION)
    assert "".join(answer.to_frame().text).strip() == answer.text


def test_without_pandas_the_error_says_what_to_install(ex, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match="pip install"):
        ex.to_frame()


def test_show_prints_in_a_terminal_and_displays_in_a_notebook(ex, ctx, capsys, monkeypatch):
    ex.show()
    ctx.show()
    assert capsys.readouterr().out.splitlines() == [repr(ex), repr(ctx)]
    shown = []

    class Shell:
        kernel = object()

    import types

    module, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    module.get_ipython = Shell
    display.HTML, display.display = str, shown.append
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    ex.show()
    ctx.show()
    assert shown[0].startswith("<iframe srcdoc=")
    assert shown[1] == ctx._repr_html_()


def test_what_holds_a_model_says_why_it_is_not_pickled(shapes, ex, ctx):
    for one, instead in ((shapes, "from_pretrained"), (ex, "safetensors"), (ctx, "Context.load")):
        for refused in (pickle.dumps, copy.deepcopy):
            with pytest.raises(TypeError, match=instead):
                refused(one)
        assert copy.copy(one).__dict__ == one.__dict__
    rule = Knockout("image", "query", "from 4")
    assert pickle.loads(pickle.dumps(rule)) == rule


@pytest.mark.parametrize(
    "given", ["image->query@from 4", ["image->query@from 4"], Knockout("image", "query", "from 4")]
)
def test_knockouts_are_texts_too(shapes, given):
    said = shapes.generate(SAMPLE, QUESTION, knockout=given).token_ids
    assert said == shapes.generate(SAMPLE, QUESTION, knockout=Knockout("image", "query", "from 4")).token_ids
    assert shapes.explain(SAMPLE, QUESTION, knockout=given).token_ids == said
    with shapes.stream(SAMPLE, QUESTION, knockout=given) as stream:
        assert [step.token_id for step in stream] == said
    inputs, _ = shapes.prepare(SAMPLE, QUESTION)
    with shapes.knocked_out(*(given if isinstance(given, list) else [given])):
        output = shapes.model.generate(**inputs, max_new_tokens=32, do_sample=False)
    assert output[0, inputs["input_ids"].shape[1] :].tolist()[: len(said)] == said


@pytest.mark.parametrize("given", ["image", 7, [3], "image->", "image->query@from x"])
def test_wrong_knockouts_say_what_is_accepted(shapes, given):
    with pytest.raises(InputError):
        shapes.generate(SAMPLE, QUESTION, knockout=given)


@pytest.mark.parametrize(("text", "value"), [("5%", 0.05), (" 12.5% ", 0.125), ("29", 29), ("0.3", 0.3), (0.3, 0.3)])
def test_keep_is_a_text_too(text, value):
    found = parse_keep(text)
    assert (found, type(found)) == (value, type(value))


def test_kept_by_a_text_is_what_a_number_keeps(shapes, ctx):
    same = shapes.compress(SAMPLE, keep=0.05)
    assert ctx.settings == same.settings
    assert ctx.positions.equal(same.positions)
    with pytest.raises(InputError, match="5%"):
        shapes.compress(SAMPLE, keep="a lot")


FACTS = {"model", "revision", "type", "fingerprint", "dtype", "device", "versions", "date", "question", "method"}
FACTS |= {"final_norm", "heads", "knockouts", "answer"}


def test_every_file_says_what_it_was_made_with(shapes, ctx, tmp_path):
    ex = shapes.explain(SAMPLE, QUESTION, knockout="image->generated@0")
    found = {}
    for kind in ("png", "json", "html", "safetensors"):
        ex.save(tmp_path / f"a.{kind}", method="attention")
    with Image.open(tmp_path / "a.png") as image:
        found["png"] = json.loads(image.text["mllm_fast.provenance"])
    found["json"] = json.loads((tmp_path / "a.json").read_text())["provenance"]
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        found["safetensors"] = json.loads(file.metadata()["mllm_fast.provenance"])
    assert found["png"] == found["json"] == found["safetensors"] == ex.provenance("attention")
    made = found["png"]
    assert made.keys() >= FACTS
    assert (made["model"], made["dtype"], made["knockouts"]) == ("shapes", "float32", ["image->generated@0"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", made["date"])
    assert made["versions"].keys() >= {"python", "torch", "transformers"}
    page = (tmp_path / "a.html").read_text()
    assert all(word in page for word in (made["fingerprint"], made["date"], "generated@0"))
    ctx.save(tmp_path / "c.safetensors")
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        about = json.loads(file.metadata()["mllm_fast.context"])
    assert about["model"]["id"] == "shapes"
    assert about["versions"] == made["versions"]


def test_a_verdict_is_html():
    one = Verification(0, -0.1, 2, 40, -1.0, 0.1, (0.0, 0.2))
    assert "holds" in Closed(one._repr_html_()).said


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["knockout", "--out", "a.png"], "a.png"),
        (["detect", "--out", "b.png"], "b.png"),
        (["kept", "c.safetensors", "--out", "c.png"], "c.png"),
    ],
)
def test_pictures_of_commands_say_it_too(command, name, shapes, ctx, tmp_path, monkeypatch):
    from mllm_fast import cli

    monkeypatch.chdir(tmp_path)
    ctx.save("c.safetensors")
    monkeypatch.setattr(sys, "argv", ["mllm-fast", *command])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    with Image.open(name) as image:
        made = json.loads(image.text["mllm_fast.provenance"])
    assert made["model"] == "shapes"
    assert made.keys() >= {"fingerprint", "dtype", "device", "versions", "date"}


def test_reports_say_it_too(tmp_path, monkeypatch):
    from mllm_fast import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mllm-fast", "eval", "attention-share", "--count", "1", "--out", "made"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    folder = tmp_path / "made" / "attention-share"
    made = json.loads((folder / "figures.json").read_text())["provenance"]
    assert made["model"] == "shapes"
    for page in ("report.md", "report.html"):
        assert made["fingerprint"] in (folder / page).read_text()
