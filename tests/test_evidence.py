"""The evidence of arXiv 2411.10950 on the embedded model, against the definitions written out here."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mllm_fast.evaluation.samples import scenes
from mllm_fast.evaluation.studies import evidence
from mllm_fast.evaluation.studies.evidence import POSITIONS, Evidence


@pytest.fixture(scope="module")
def done(shapes):
    sample = scenes(2).list[1]
    return sample, Evidence().rows(shapes, sample)


def logits(vlm, ex, vector):
    """Of a vector under the statistics of the final row."""
    norm = vlm.text.norm
    scale = torch.rsqrt(ex.trace.final[0].square().mean() + norm.variance_epsilon)
    return (vlm.text.head.weight @ (norm.weight * vector * scale)).detach()


def reciprocal(values, word):
    return 1 / (1 + int((values > values[word]).sum()))


def test_the_question_about_a_sentence(shapes, done):
    _, rows = done
    row = rows[0]
    noun, other, attribute, wrong = (row[name] for name in ("noun", "other noun", "attribute", "other attribute"))
    assert len({noun, other}) == len({attribute, wrong}) == 2
    ids = {word: int(shapes.prompts.answer_ids(word)[0]) for word in (noun, other, attribute, wrong)}
    found, at = {}, {}
    for name, stated, asked in (("S0", noun, noun), ("S1", other, noun), ("S2", noun, other)):
        ex = shapes.explain(None, f"the {stated} is {attribute}. what color is the {asked}?", attribute)
        spelled = [shapes.processor.tokenizer.decode([i]).strip() for i in ex.input_ids.tolist()]
        found[name], at[name] = ex, spelled.index(attribute)
    ex, text = found["S0"], row["text"]
    heads = [(layer, head) for layer, head, _ in ex.top_heads(0, 10)]
    scores = ex.position_scores(0, heads)
    share = float(scores[:, at["S0"]].sum() / scores[:, : ex.layout.prompt_length].sum())
    assert text["a: share of the increase at the attribute"] == pytest.approx(share, rel=1e-3)  # a small part of a sum
    values = [
        logits(
            shapes, ex, shapes.text.projection(layer, head) @ ex.trace.position_values(0, [(layer, head)])[0][at["S0"]]
        )
        for layer, head in heads
    ]
    mean = lambda word: np.mean([reciprocal(v, ids[word]) for v in values])  # noqa: E731
    assert text["b: 1/rank of the attribute in writes"] == pytest.approx(mean(attribute))
    assert text["b: 1/rank of another attribute"] == pytest.approx(mean(wrong))
    gap = np.mean([float(v[ids[attribute]] - v[ids[wrong]]) for v in values])
    assert text["b: logit difference"] == pytest.approx(gap, abs=1e-4)
    for name, right, against, keys in (
        ("S0", noun, other, ("c: 1/rank of the noun at the attribute, S0", "c: logit difference, S0")),
        ("S1", other, noun, ("c: 1/rank of the stated noun, S1", "c: logit difference, S1")),
    ):
        stages = found[name].replay.layer_inputs(at[name])
        read = [logits(shapes, found[name], stages[layer]) for layer, _ in heads]
        assert text[keys[0]] == pytest.approx(np.mean([reciprocal(v, ids[right]) for v in read]))
        gap = np.mean([float(v[ids[right]] - v[ids[against]]) for v in read])
        assert text[keys[1]] == pytest.approx(gap, abs=1e-3)
    for name, one in found.items():
        alpha = one.attention(0)
        looks = np.mean([float(alpha[layer, head, at[name]]) for layer, head in heads])
        assert text[f"d: attention at the attribute, {name}"] == pytest.approx(looks, rel=1e-5)


def test_the_question_about_an_image(shapes, done):
    sample, rows = done
    row = rows[0]
    ex = shapes.explain(sample.image, f"what color is the {row['noun']}?", row["attribute"])
    image = ex.layout.images[0].positions
    right = int(shapes.prompts.answer_ids(row["attribute"])[0])
    table = shapes.text.decoder.get_input_embeddings().weight.detach()
    alpha, looks, embedded, written = ex.attention(0), [], [], []
    for layer, head, _ in ex.top_heads(0, 10):
        score = ex.position_scores(0, [(layer, head)])[0]
        best = sorted(image.tolist(), key=lambda at: -float(score[at]))[:POSITIONS]
        looks.append(float(alpha[layer, head, best].sum()))
        writes = ex.trace.position_values(0, [(layer, head)])[0][best] @ shapes.text.projection(layer, head).T
        written += [reciprocal(logits(shapes, ex, write), right) for write in writes]
        embedded += [reciprocal(table @ vector, right) for vector in ex.replay.embeds[0, best]]
    found = row["image"]
    assert found["d: attention to the best image tokens"] == pytest.approx(np.mean(looks), rel=1e-4)
    assert found["b: 1/rank of the attribute in writes"] == pytest.approx(np.mean(written), rel=1e-3)
    assert found["e: 1/rank of the attribute in visual embeddings"] == pytest.approx(np.mean(embedded), rel=1e-3)


def test_the_other_noun_is_not_in_the_image(done):
    sample, rows = done
    there = {thing.name.split()[-1] for thing in sample.things}
    assert len(rows) >= 1
    assert all(row["other noun"] not in there for row in rows)


def test_report_and_layer_inputs_of_several_positions(shapes, done):
    sample, rows = done
    report = Evidence().report({sample.name: rows})
    assert [table.rows[0][0][0] for table in report.tables] == ["a", "b"]
    assert report.figures["objects"] == len(rows)
    ex = shapes.explain(sample.image, "what color is the circle?", "red")
    several = ex.replay.layer_inputs(torch.tensor([9, 4]))
    for one, position in zip(several, (9, 4), strict=True):
        torch.testing.assert_close(one, ex.replay.layer_inputs(position), rtol=1e-4, atol=1e-4)
    assert evidence.TOP == 10


def test_raw_questions_with_a_beginning_of_the_answer(shapes):
    """The model reads the sentence, the question and the beginning of the answer, and nothing else."""
    study = Evidence("Q: what color is the {noun}? A:", prefix="the color of the {noun} is", chat_template=False)
    ex = study.asked(shapes, None, "the star is red.", "circle", "red")
    said = "the star is red. Q: what color is the circle? A: the color of the circle is red"
    assert ex.input_ids.tolist() == shapes.processor.tokenizer(said).input_ids
    assert ex.text == "red"
    (row, *_) = study.rows(shapes, scenes(2).list[1])
    assert 0 < row["image"]["e: 1/rank of the attribute in visual embeddings"] <= 1
    assert study.settings["prefix"] == "the color of the {noun} is"
