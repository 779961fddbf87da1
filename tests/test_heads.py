"""Which heads answer, and what they carry: the measures by hand, and images all the way through."""

from __future__ import annotations

import json
import pickle
from types import SimpleNamespace

import families
import knocked
import numpy as np
import pytest
import tiny
import torch
from sklearn import metrics

import mllm_fast as mf
from mllm_fast.evaluation.judges.judge import NounJudge
from mllm_fast.evaluation.report import plain, to_markdown
from mllm_fast.evaluation.samples import Sample, Thing, scenes
from mllm_fast.evaluation.studies import heads
from mllm_fast.evaluation.studies.heads import Heads, readable
from mllm_fast.evaluation.studies.heads_report import importance, overlap, percents, top
from mllm_fast.evaluation.studies.word_alignment import cells, widened
from mllm_fast.explain import logit_lens
from mllm_fast.shapes.scenes import COLORS


def test_measures_by_hand():
    found = importance([[[1, 2], [0, -3]], [[3, 2], [0, -5]]])
    assert found.tolist() == [[1, 1], [0, -2]]
    assert importance([[[-1, -2]]]).tolist() == [[-1, -2]]
    assert percents(np.array([[3.0, -1.0], [1.0, 0.0]])).tolist() == [[75.0, 0.0], [25.0, 0.0]]
    assert percents(np.array([[-3.0, -1.0]])).tolist() == [[0.0, 0.0]]
    assert top(found, 3) == [(0, 0), (0, 1), (1, 0)]
    assert overlap(found, np.array([[0, 5], [4, 3]]), 2) == 1
    values = torch.tensor([0.5, 3.0, 2.0, -1.0])
    assert readable(values, 2, 0) == {"reciprocal rank": 0.5, "logit minus": 1.5}
    ranks = metrics.label_ranking_average_precision_score(np.eye(4)[2:3], values[None].numpy())
    assert readable(values, 2, 0)["reciprocal rank"] == ranks
    assert readable(values, 3, 1) == {"reciprocal rank": 0.25, "logit minus": -4.0}


def test_layer_inputs(family, built, picture):
    vlm = mf.VLM(*built(family))
    ex = vlm.explain(picture, "what color is the circle ?", "red circle")
    given = knocked.whole(vlm, ex.images, ex.prompt, ex.token_ids)
    with torch.no_grad(), tiny.eager(vlm.model):
        found = vlm.model(**given, output_hidden_states=True).hidden_states
    position = int(ex.layout.images[0].positions[3])
    stages = ex.replay.layer_inputs(position)
    assert len(stages) == len(found) == ex.num_layers + 1
    for mine, theirs in zip(stages[:-1], found[:-1], strict=True):
        torch.testing.assert_close(mine, theirs[0, position], rtol=0, atol=1e-9)
    torch.testing.assert_close(vlm.text.norm(stages[-1]), found[-1][0, position], rtol=0, atol=1e-9)


def test_writes_pass_the_norm_behind_the_attention(picture):
    """As `project` has them: scaled by that norm at the row."""
    model, processor = families.build("gemma3")
    vlm = mf.VLM(model.double(), processor)
    ex = vlm.explain(picture, "what color is the circle ?", "red")
    against = int(vlm.prompts.answer_ids("blue")[0])
    words = vlm.text.head.weight.shape[0]
    wanted = []
    for layer, head, _ in ex.top_heads(0, heads.TOP):
        at = int(ex.position_scores(0, [(layer, head)])[0].argmax())
        values = logit_lens.word_values(ex, 0, logit_lens.write_of(ex, 0, layer, head, at), "unembedding", write=True)
        named = dict(ex.project(0, layer, head, at, k=words))
        assert named[vlm.processor.tokenizer.decode([ex.token_ids[0]])] == pytest.approx(float(values[ex.token_ids[0]]))
        wanted.append(float(values[ex.token_ids[0]] - values[against]))
    assert heads._from_writes(ex, against)["logit minus"] == pytest.approx(np.mean(wanted), abs=1e-6)
    assert ex.trace.write_scale is not None


@pytest.fixture(scope="module")
def done():
    vlm, listed = mf.VLM.from_pretrained("shapes"), scenes(4).list
    return vlm, listed, {sample.name: Heads().rows(vlm, sample) for sample in listed}


def test_rows(done):
    vlm, listed, rows = done
    for sample in listed:
        shapes = [o.shape for o in sample.scene.objects]
        expected = [(o.color, o.shape) for o in sample.scene.objects if shapes.count(o.shape) == 1]
        assert [(row["attribute"], row["noun"]) for row in rows[sample.name]] == expected
    sample = next(sample for sample in listed if rows[sample.name])
    row = rows[sample.name][0]
    question = f"what color is the {row['noun']}?"
    visual = vlm.explain(sample.image, question, row["attribute"])
    assert row["visual"] == visual.head_scores[0].tolist()
    textual = vlm.explain(None, f"the {row['noun']} is {row['attribute']}. {question}", row["attribute"])
    assert row["textual"] == textual.head_scores[0].tolist()
    assert len(row["layers"]) == visual.num_layers + 1
    best = [head[:2] for head in visual.top_heads(0, 10)]
    mask = next(o.mask for o in sample.scene.objects if (o.color, o.shape) == (row["attribute"], row["noun"]))
    hits = torch.from_numpy(widened(cells(mask, visual.layout.images[0]), 1))
    part = visual.heatmap(0, heads=best).clamp(min=0)[hits].sum()
    assert row["held"]["visual"] == pytest.approx(
        float(part / visual.position_scores(0, best).sum(0).clamp(min=0).sum())
    )
    assert row["right"]["visual"] == (vlm.generate(sample.image, question).text == row["attribute"])


def test_what_is_known_of_the_embedded_model(done):
    """It answers from the object's own tokens, and turns elsewhere when asked of another one."""
    _, listed, rows = done
    report = Heads().report(rows)
    found = report.figures
    assert found["right"]["visual"] > 0.9
    assert found["held"]["visual"][0] > 2 * found["area"]
    assert found["attention"]["own"] > 2 * found["attention"]["other"]
    assert found["read"]["layers"][-2]["reciprocal rank"][0] > 0.5
    assert all(len(chart.png()) > 5000 for chart in report.charts)
    assert [row[0] for row in report.tables[0].rows][2].startswith("the best image token's input embedding")
    assert Heads().report({sample.name: [] for sample in listed}).says == [
        "No object has an attribute and a noun of its own."
    ]


def test_the_share_at_the_statements_word(monkeypatch):
    """All of the increase at one token of the prompt in turn: only the statement's own word counts."""
    vlm = mf.VLM.from_pretrained("shapes")
    ex = vlm.explain(None, "the circle is red. what color is the circle?", "red")
    ids = ex.input_ids.tolist()
    word = ids.index(vlm.prompts.answer_ids("red").item())
    for position in range(ex.layout.prompt_length):
        scores = torch.zeros(2, len(ids))
        scores[:, position] = 1.0
        scores[1, 0] = -5.0  # what speaks against does not count
        ex.position_scores = lambda token, k, scores=scores: scores
        expected = None if position == 0 else float(position == word)
        assert heads._at_word(vlm, ex, "the circle is red.", "red") == expected
    assert heads._at_word(vlm, ex, "a sentence that is not there", "red") is None


def test_objects_without_a_name_of_their_own_are_left_out():
    judge = NounJudge({"dog": [], "cat": []}, {"red": ["crimson"], "big": []})
    mask = np.ones((4, 4), bool)
    names = ("crimson dog", "big red cat", "dog", "tree", "big dog")
    sample = Sample("one", SimpleNamespace(), tuple(Thing(name, mask) for name in names))
    asked = []
    evaluation = Heads(words=judge)
    evaluation._row = lambda vlm, image, attribute, noun, *_: asked.append((attribute, noun)) or {}
    evaluation.rows(None, sample)
    assert asked == []  # three dogs, and a cat of two attributes
    evaluation.rows(None, Sample("two", SimpleNamespace(), (Thing("crimson dog", mask), Thing("tree", mask))))
    assert asked == [("red", "dog")]


def test_names_of_several_words():
    judge = NounJudge({"dog": [], "hot dog": [], "ball": [], "football": []}, {"red": [], "light blue": ["sky blue"]})
    found = [
        Heads(words=judge)._named(name) for name in ("red hot dog", "red football", "sky blue ball", "dog", "tree")
    ]
    assert found == [("red", "hot dog"), ("red", "football"), ("light blue", "ball"), ("", "dog"), ("", "")]


def test_one_object_has_no_errors(done):
    """And no NaN in what is written."""
    _, _, rows = done
    one = next(found[0] for found in rows.values() if found)
    report = Heads().report({"one": [one | {"held": {"visual": 0.5, "textual": None}}]})
    json.dumps(plain(report.figures), allow_nan=False)
    text = to_markdown(report)
    assert "nan" not in text
    assert "of a textual question's an unknown share" in text


def test_a_second_model(built, tmp_path):
    processor = mf.VLM.from_pretrained("shapes").processor
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(processor.tokenizer), **sizes)).save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    evaluation = pickle.loads(pickle.dumps(Heads(second_model=str(tmp_path))))
    vlm = mf.VLM.from_pretrained("shapes")
    rows = {sample.name: evaluation.rows(vlm, sample) for sample in scenes(2).list}
    report = evaluation.report(rows)
    assert np.shape(report.figures["importance"]["second"]) == (2, 2)
    assert report.tables[1].columns[-1] == "textual question, second model"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"question": "what color?"}, "names the object as {noun}"),
        ({"statement": "{noun} is red"}, "has {noun} and {attribute}"),
        ({"words": NounJudge({"dog": [], "cat": []})}, "two attributes"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(mf.InputError, match=message):
        Heads(**options)
    assert len(COLORS) > 2
