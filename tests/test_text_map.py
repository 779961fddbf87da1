"""Maps of text: the parts of the prompt and of the earlier answer in a word; and attention sinks, found by norm."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image

from mllm_fast import InputError
from mllm_fast.core.assets import SAMPLE
from mllm_fast.explain.figure import _without

QUESTION = "Describe the image."


@pytest.fixture(scope="module")
def ex(shapes):
    return shapes.explain(SAMPLE, QUESTION)


@pytest.mark.parametrize("heads", [1, 10, "all", [(3, 0), (4, 3)]])
def test_values_are_those_of_the_positions(ex, heads):
    for token in (0, 5):
        found = ex.text_map(token, heads)
        scores = ex.position_scores(token, heads).sum(0)
        torch.testing.assert_close(found.values, scores[found.positions])
        image = set(ex.layout.positions("image").tolist())
        seen = ex.layout.prompt_length + token  # the row that predicts the token is the one before it
        assert found.positions.tolist() == [one for one in range(seen) if one not in image]
        everything = sum(found.sums.values())
        separators = scores[ex.layout.positions("image_separator")].sum()
        assert everything == pytest.approx(float(scores.sum() - separators), abs=1e-5)
        assert found.sums["image"] == pytest.approx(float(scores[ex.layout.positions("image")].sum()), abs=1e-6)


def test_words_are_those_of_the_prompt_and_the_answer_before(ex, shapes):
    found = ex.text_map(5)
    said = "".join(word for word, name in zip(found.words, found.segments, strict=True) if name == "generated")
    assert said.strip() == "".join(ex.tokens[:5]).strip()
    assert "describe the image" in "".join(found.words)
    assert found.token == ex.labels[5] == "white"


def test_it_is_coloured_text_in_a_notebook(ex):
    found = ex.text_map(5)
    page = found._repr_html_()
    assert page.count("<span") == len(found.words)
    assert "&lt;s&gt;" in page
    best = int(found.values.argmax())
    spans = re.findall(r"<span[^>]*>", page)
    assert "rgb(252, 232, 140)" in spans[best]
    assert all("background" not in spans[i] for i in (found.values <= 0).nonzero()[:, 0].tolist())
    assert "\n" not in repr(found)
    assert "image +" in found.note


def test_the_page_has_the_numbers(ex, tmp_path):
    import json

    ex.save(tmp_path / "a.html")
    data = json.loads(re.search(r"const data = (\{.*\});\n", (tmp_path / "a.html").read_text())[1])
    found = ex.text_map(5)
    read = data["tokens"][5]["read"]
    assert data["words"][: len(found.words)] == list(found.words)
    np.testing.assert_allclose(np.sum(read["heads"], 0), found.values, rtol=1e-3, atol=1e-5)
    assert read["image"] == pytest.approx(found.sums["image"], abs=1e-3)
    attention = ex.attention(5).mean((0, 1))[found.positions]
    np.testing.assert_allclose(read["attention"], attention, rtol=1e-3, atol=1e-6)


def test_text_alone_has_pictures_and_pages(shapes, tmp_path):
    ex = shapes.explain(None, "What color is the star?", "blue")
    ex.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as drawn:
        pixels = np.asarray(drawn.convert("RGB")).reshape(-1, 3)
    assert (pixels == (252, 232, 140)).all(1).any()  # the word of the largest value
    assert ex.text_map(0).sums.keys() == {"system"}
    assert "<img" not in ex._repr_html_()


def norms(shapes, ex):
    """The norms of the residual vectors of the prompt after each layer, from transformers."""
    inputs, _ = shapes.prepare(SAMPLE, QUESTION)
    found = []
    layers = shapes.text.layers
    handles = [one.register_forward_hook(lambda _, __, out: found.append(out)) for one in layers]
    with torch.no_grad():
        shapes.model(**inputs)
    for one in handles:
        one.remove()
    states = [out[0] if isinstance(out, tuple) else out for out in found]
    return torch.stack([one.reshape(-1, one.shape[-1]).norm(dim=-1) for one in states], 1)


def test_sinks_are_found_by_their_norm(shapes, ex):
    found = norms(shapes, ex)
    ratio = (found / found.median(0).values).max(1).values
    for place in (1, 4, 12):
        highest = ratio.sort(descending=True).values
        factor = float((highest[place - 1] + highest[place]) / 2)
        assert factor > 1
        assert ex.sinks(factor).tolist() == (ratio > factor).nonzero()[:, 0].tolist()
    assert not len(ex.sinks(float(ratio.max()) * 1.01))
    with pytest.raises(InputError, match="above 1"):
        ex.sinks(1.0)


def test_a_map_without_some_positions_stands_beside_the_plain_one(ex, tmp_path):
    image = ex.layout.positions("image")
    plain, both = np.asarray(ex.image(5)), np.asarray(ex.image(5, without=image[:3]))
    assert both.shape[1] > plain.shape[1] + 400
    assert np.array_equal(both[160:500, :880], plain[160:500, :880])
    ex.save(tmp_path / "a.png", 5, without=image[:3])
    with Image.open(tmp_path / "a.png") as saved:
        assert np.array_equal(np.asarray(saved), both)
    with pytest.raises(InputError, match=r"save the explanation as \.png"):
        ex.save(tmp_path / "a.json", without=image[:3])
    assert not (tmp_path / "a.json").exists()
    with pytest.raises(InputError, match="no patches can be left out"):
        _without(ex, ex.images[0], (np.zeros((96, 96)), (0.0, 0.0, 96.0, 96.0)), ex.layout.images[0], image[:3])
