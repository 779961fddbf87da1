"""Localisation by hand: distances from a mask, the tokens of a phrase, peaks, and bands of layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from mllm_fast.core.errors import InputError
from mllm_fast.core.layout import ImageLayout, Tile
from mllm_fast.evaluation.judges.judge import Comparison, shapes_judge
from mllm_fast.evaluation.samples import scenes
from mllm_fast.evaluation.studies.localisation import Localisation, band_means, map_layers
from mllm_fast.evaluation.studies.word_alignment import cells_within, phrase_tokens
from mllm_fast.knockout.rule import Knockout


def test_cells_within_a_distance():
    """Tokens of 10 x 20 pixels in a box that begins at (10, 0): from their centres to the centre of one pixel."""
    layout = ImageLayout(torch.arange(6), (50, 40), (Tile(2, 3, (10.0, 0.0, 40.0, 40.0)),))
    mask = np.zeros((40, 50), bool)
    mask[9, 14] = True  # (14.5, 9.5): half a pixel left of the first token's centre, and above it
    for row in range(2):
        for col in range(3):
            far = np.hypot((10 + 10 * col + 5 - 14.5) / 10, (20 * row + 10 - 9.5) / 20)
            assert cells_within(mask, layout, far + 1e-6)[row, col]
            assert not cells_within(mask, layout, far - 1e-6)[row, col]
    assert cells_within(mask, layout, 1.02).sum() == 1
    assert cells_within(mask, layout, 1.06).tolist() == [[True, True, False], [True, False, False]]
    with pytest.raises(InputError, match="the mask is"):
        cells_within(mask.T, layout, 1)


def test_tokens_of_a_phrase():
    tokens = ["a", " big", " red", " cir", "cle", ",", " two", " red", " circles", " and", " Circ", "us"]
    judge = shapes_judge()
    assert phrase_tokens(tokens, "red circle", judge) == [2, 3, 4, 7, 8]
    assert phrase_tokens(tokens, "red circle", None) == [2, 3, 4, 7, 8]
    assert phrase_tokens(tokens, "blue circle", None) == []
    assert phrase_tokens(tokens, "circus", None) == [10, 11]
    assert phrase_tokens(tokens, "dog", judge) == []
    assert phrase_tokens(tokens, "", None) == []


class Closed:
    """A judge of which the second object is lost."""

    settings: ClassVar[dict] = {"judge": "closed"}

    def compare(self, reference, said):
        assert (reference, said) == ("a red circle, a blue star", "nothing")
        return Comparison(["red circle", "blue star"], ["red circle"], ["red circle"], ["blue star"], 7)


@pytest.mark.parametrize("objects", ["lost", "all"])
def test_localisation_by_hand(objects):
    """Three layers: one that looks at the object, one a token beside it, and one further away."""
    scene = scenes(1).list[0]
    kind = type(scene.things[0])
    masks = {"red circle": np.zeros((96, 96), bool), "blue star": np.zeros((96, 96), bool)}
    masks["red circle"][:8, :8] = masks["blue star"][88:, 88:] = True  # the first and the last token
    sample = type(scene)("one", scene.source, tuple(kind(name, mask) for name, mask in masks.items()))
    layout = ImageLayout(torch.arange(2, 146), (96, 96), (Tile(12, 12, (0.0, 0.0, 96.0, 96.0)),))
    tokens = ["a", " red", " cir", "cle", ",", " a", " blue", " star"]
    ids = list(range(10, 18))
    calls, asked = [], []

    def attention(token):
        """The row of a token is that in which the next one is predicted: the one of the blue star's words differ."""
        asked.append(token)
        alpha = torch.zeros(3, 2, 160)
        start = {7: 143, 8: 143}.get(token, 0)
        for layer, peak in enumerate((start, abs(start - 12), abs(start - 24))):
            alpha[layer, :, 2 + peak] = 0.4 + 0.1 * layer
            alpha[layer, 0, 2 + 70] = 0.5  # one head looks elsewhere; the mean decides
        alpha[:, :, 0] = 0.5  # no image token, though it gets more
        return alpha

    def generate(image, prompt, max_new_tokens, knockout=None):
        calls.append(knockout)
        if knockout is not None:
            return SimpleNamespace(text="nothing")
        return SimpleNamespace(text="a red circle, a blue star", tokens=tokens, token_ids=ids)

    def explain(image, prompt, answer):
        assert answer == [*ids, 10]  # one more token, whose row is that of the last one
        values = torch.arange(144.0)
        return SimpleNamespace(
            images=[scene.image],
            layout=SimpleNamespace(images=[layout]),
            attention=attention,
            attribution=lambda token: values,
        )

    study = Localisation(judge=Closed(), objects=objects)
    rows = study.rows(SimpleNamespace(generate=generate, explain=explain), sample)
    assert calls == [None, Knockout("image_block", "generated")]
    assert [row["thing"] for row in rows] == (["blue star"] if objects == "lost" else ["red circle", "blue star"])
    star = rows[-1]
    assert asked[-2:] == [7, 8]
    assert star["words"] == [" blue", " star"]
    assert (star["layers"], star["map"], star["all"], star["logprob"]) == ([True, True, False], True, False, True)
    assert (
        star["chance"] == 4 / 144
    )  # the token itself, those beside and above it, and the one across: sqrt(2) / 2 away
    assert np.array(star["mask"]).nonzero() == (11, 11)
    assert np.array(star["shown"]).argmax() == 131
    assert sum(row["tokens"] for row in rows) == 7
    report = study.report({"one": rows, "two": [{"thing": "dog", "skipped": "no mask", "tokens": 0}]})
    figures = report.figures
    assert figures["layers"] == [1, 1, 0]
    assert (figures["objects"], figures["skipped"]) == (len(rows), 1)
    assert "1 objects have no mask" in report.says[1]


def test_bands_of_layers():
    """Ten of 80 layers, four of 32, else an eighth; the mean of the layers' accuracies."""
    assert band_means([0.0] * 10 + [1.0] * 70)["0-9"] == 0
    assert list(band_means([1.0] * 32))[-1] == "28-31"
    assert band_means([0, 1, 1, 0, 0.5, 1, 1, 1, 1, 1, 1, 1, 0]) == {
        **{"0-1": 0.5, "2-3": 0.5, "4-5": 0.75, "6-7": 1, "8-9": 1, "10-11": 1, "12": 0}
    }
    assert map_layers(80) == (20, 40)
    assert map_layers(32) == (16, 24)
    assert map_layers(6) == (1, 3)
    assert map_layers(1) == (0, 0)


def test_an_object_that_is_found_by_its_last_word_is_told():
    row = {"thing": "blue ring", "by_last_word": True, "layers": [True], "map": True, "all": True, "logprob": True}
    row |= {"chance": 0.1, "shown": [[1.0]], "mask": [[True]], "tokens": 0}
    report = Localisation().report({"a": [row]})
    assert "1 objects are found in their description by the last word" in " ".join(report.says)
