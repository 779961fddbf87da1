"""What is measured of joint models: by hand, and against scikit-learn where it has the same."""

from __future__ import annotations

import math

import numpy as np
import owl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

import mllm_fast as mf
from mllm_fast.core.corruptions import KINDS, degrade
from mllm_fast.core.errors import InputError
from mllm_fast.evaluation.joint.base import interval
from mllm_fast.evaluation.joint.bias import (
    NONE,
    RANDOM,
    Asked,
    Bias,
    Swap,
    effects,
    picture_means,
    swap_scenes,
    swapped_questions,
    two_folders,
    words_kept,
)
from mllm_fast.evaluation.joint.caption_score import parse_score
from mllm_fast.evaluation.joint.hallucination import Hallucination, is_a, measure
from mllm_fast.evaluation.joint.quality import box_of
from mllm_fast.evaluation.joint.simulatability import fit, told_apart
from mllm_fast.evaluation.judges.judge import NounJudge, shapes_judge
from mllm_fast.evaluation.roc import auroc, best_threshold, split_threshold
from mllm_fast.joint.perturb import at_random, toward
from mllm_fast.joint.precision import Found, judge_boxes
from mllm_fast.joint.presence import check_classes, check_text
from mllm_fast.runtime.likelihood import answer_probabilities, expectation, yes_probabilities

scored = st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=2, max_size=40)


@pytest.mark.parametrize(
    ("thing", "kind", "same"),
    [
        ("dog", "dog", True),
        ("red circle", "circle", True),
        ("red circle", "red circle", True),
        ("red circle", "blue circle", False),
        ("teddy bear", "bear", False),
        ("hot dog", "dog", False),
        ("Teddy bear", "teddy bear", True),
        ("circle", "red circle", False),
    ],
)
def test_what_an_object_is(thing, kind, same):
    assert is_a(thing, kind) is same


@settings(max_examples=80)
@given(scored)
def test_auroc_is_scikit_learns(pairs):
    scores, truth = [s / 12 for s, _ in pairs], [t for _, t in pairs]
    if len(set(truth)) < 2:
        assert math.isnan(auroc(scores, truth))
    else:
        assert auroc(scores, truth) == pytest.approx(roc_auc_score(truth, scores))


def test_threshold_is_chosen_on_one_half_and_tested_on_the_other():
    scores = [0.1, 0.2, 0.8, 0.9, 0.15, 0.7, 0.3, 0.95]
    truth = [False, False, True, True, False, True, True, False]
    first = [True] * 4 + [False] * 4
    assert best_threshold(scores[:4], truth[:4]) == pytest.approx(0.5)
    found = split_threshold(scores, truth, first)
    assert found is not None
    assert (found.threshold, found.true_kept, found.false_flagged) == (pytest.approx(0.5), 0.5, 0.5)
    assert split_threshold(scores, truth, [True] * 8) is None


def test_boxes_are_right_once_and_best_first():
    boxes = torch.tensor([[0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60], [0, 0, 10, 10]], dtype=torch.float32)
    chance = torch.tensor([[0.9, 0.01], [0.8, 0.3], [0.7, 0.6], [0.01, 0.01]])
    things = [(0, torch.tensor([0.0, 0, 10, 10])), (1, torch.tensor([52.0, 50, 60, 60]))]
    found = judge_boxes(chance.logit(), boxes, things)
    # of query 0 the second box overlaps the first and goes; of query 1 the best fits its thing by 0.8
    assert sorted(found) == [
        (pytest.approx(0.3), False),
        (pytest.approx(0.6), True),
        (pytest.approx(0.7), False),
        (pytest.approx(0.9), True),
    ]
    # both fit the thing by 7 of 13, each other by a quarter
    sides = torch.tensor([[-3.0, 0, 7, 10], [3, 0, 13, 10]])
    twice = judge_boxes(torch.tensor([[0.9], [0.8]]).logit(), sides, things[:1])
    assert [hit for _, hit in twice] == [True, False]  # one thing is found once


@settings(max_examples=60)
@given(scored)
def test_average_precision_is_scikit_learns_made_monotonic(pairs):
    scores = np.linspace(1, 0, len(pairs))
    right = np.array([hit for _, hit in pairs])
    found = Found(scores, right, max(1, int(right.sum())))
    if not right.any():
        assert found.average_precision() == 0
        return
    _, precisions, recalls = found.curve()
    raw = float(np.sum(np.diff(recalls, prepend=0.0) * precisions))
    assert raw == pytest.approx(average_precision_score(right, scores))
    assert found.average_precision() >= raw - 1e-12
    recall, threshold = found.recall_at(0.5)
    kept = scores >= threshold
    if recall:
        assert right[kept].mean() >= 0.5
        assert right[kept].sum() / found.things == pytest.approx(recall)


def test_intervals_and_boxes():
    low, high = interval(0.8, 100)
    assert (low, high) == (pytest.approx(0.7112, abs=1e-4), pytest.approx(0.8666, abs=1e-4))  # Wilson's, by hand
    assert interval(0.0, 50)[0] == 0
    assert interval(1.0, 50)[1] == pytest.approx(1)
    mask = np.zeros((6, 9), bool)
    mask[2:4, 3:8] = True
    assert box_of(mask).tolist() == [3, 2, 8, 4]
    with pytest.raises(InputError, match="mask of a thing is empty"):
        box_of(mask & False)


def test_pictures_are_made_worse_by_the_strength():
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    clear = np.asarray(picture).astype(float)
    for kind in KINDS:
        assert degrade(picture, kind, 0.0, rng) is picture
        off = [
            np.abs(np.asarray(degrade(picture, kind, s, np.random.default_rng(1))) - clear).mean() for s in (0.3, 0.9)
        ]
        assert 0 < off[0] < off[1]
    hidden = np.asarray(degrade(picture, "occlusion", 1.0, rng))
    assert 0.55 < np.mean((hidden == 128).all(-1)) < 0.8
    with pytest.raises(InputError, match="kind is one of"):
        degrade(picture, "fog", 0.5, rng)


def test_told_apart_by_where_the_things_are():
    left, right = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    left[:, :2], right[:, 2:] = True, True
    one, other = left + 0.1 * right, 5.0 * right
    assert told_apart(one, other, left, right)
    assert not told_apart(other, one, left, right)
    assert not told_apart(np.ones((4, 4)), np.ones((4, 4)), left, right)  # no better is no
    assert fit(one, left) == pytest.approx(0.9 / one.std())


def test_effects_by_hand():
    def row(change, answer, group="", kind="text"):
        return {"change": change, "group": group, "question": "q", "kind": kind, "answer": answer, "kept": 1.0}

    rows = {
        "a": [row(NONE, "red"), row("step", "blue"), row(RANDOM, "red"), row(RANDOM, "blue")],
        "b": [row(NONE, 5.0, "second", "score"), row("step", 7.0, "second", "score")],
    }
    found = effects(rows)
    assert [one["moved"] for one in found] == [1.0, 0.0, 1.0, -2.0]
    assert picture_means([one for one in found if one["change"] == RANDOM]) == [0.5]
    assert words_kept("a red circle, a star", "a blue circle, a star") == pytest.approx(0.8)
    assert words_kept("", "") == 1.0


def test_scenes_to_swap_colours_in(tmp_path):
    found = swap_scenes(3, 0, "red", "blue")
    for sample in found.list:
        colors = [one.color for one in sample.scene.objects]
        assert colors.count("red") == 1
        assert "blue" not in colors
    swap = Swap(("a photo of a red object",), ("a photo of a blue object",))
    color, shape = swapped_questions(found.list[0], swap)
    thing = next(one for one in found.list[0].scene.objects if one.color == "red")
    assert color.text == f"what color is the {thing.shape}?"
    assert (shape.text, shape.instead) == ("what shape is the red object?", "what shape is the blue object?")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    listed = two_folders([tmp_path, tmp_path]).list
    assert [(one.name, one.group) for one in listed] == [("first/a.png", "first"), ("second/a.png", "second")]
    with pytest.raises(InputError, match="one folder of images, or two"):
        two_folders([])
    with pytest.raises(InputError, match="no question was given"):
        swapped_questions(listed[0], swap)


@pytest.fixture(scope="module")
def joint(built):
    return owl.joint(mf.VLM(*built("llava")))


@pytest.fixture(scope="module")
def square():
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (32, 32, 3), dtype=np.uint8))


@pytest.mark.parametrize("way", ["step", "pgd"])
def test_changes_have_their_norm_and_turn_the_detector(joint, square, way):
    vision = joint.see(square).vision
    lower, higher = (joint.owl.embed_queries([f"a photo of a {c} circle"]).clone() for c in ("red", "blue"))
    size, whole = 0.02, float(vision.tokens.norm())
    changed = toward(joint.owl, vision, lower, higher, size, way)
    assert float((changed - vision.tokens).norm()) == pytest.approx(size * whole, rel=1e-9)

    def gain(tokens):
        """The detector's own cross-entropy of seeing the second and not the first, where it saw the first."""
        logits = joint.owl.logits(joint.owl.features(tokens), torch.cat([lower, higher]))
        shown = joint.owl.logits(joint.owl.features(vision.tokens), lower).sigmoid()[:, 0]
        seen = torch.log(torch.sigmoid(logits[:, 1])) + torch.log(1 - torch.sigmoid(logits[:, 0]))
        return float((shown / shown.sum() * seen).sum())

    with torch.no_grad():
        random = at_random(vision, size, 1)
        assert float((random - vision.tokens).norm()) == pytest.approx(size * whole, rel=1e-9)
        assert gain(changed) - gain(vision.tokens) > 3 * abs(gain(random) - gain(vision.tokens))
    if way == "step":
        steps = (changed - vision.tokens).abs()
        assert float(steps.max()) == pytest.approx(float(steps[steps > 0].min()))  # signs alone
    assert torch.equal(at_random(vision, size, 1), random)


def test_swaps_are_pairwise_where_they_can_be(joint, square):
    vision = joint.see(square).vision
    one, two, three = (joint.owl.embed_queries([f"a {name}"]).clone() for name in ("circle", "star", "ring"))
    pairs = toward(joint.owl, vision, torch.cat([one, two]), torch.cat([two, three]), 0.02)
    turned = toward(joint.owl, vision, torch.cat([two, one]), torch.cat([three, two]), 0.02)
    crossed = toward(joint.owl, vision, torch.cat([one, two]), torch.cat([three, two]), 0.02)
    torch.testing.assert_close(pairs, turned, rtol=1e-9, atol=1e-9)  # their order does not matter
    assert float((pairs - crossed).abs().max()) > 0
    many = toward(joint.owl, vision, torch.cat([one, two, one]), torch.cat([two, three]), 0.02)
    assert float((many - pairs).abs().max()) > 0


def test_changes_that_make_no_sense(joint, square):
    vision = joint.see(square).vision
    query = joint.owl.embed_queries(["a circle"])
    for wrong in ({"size": 0.0}, {"size": 0.1, "way": "leap"}, {"size": 0.1, "way": "pgd", "steps": 0}):
        with pytest.raises(InputError):
            toward(joint.owl, vision, query, query, **wrong)
    swap, empty = Swap(("a",), ("b",)), Swap((), ("b",))
    for wrong in ({"swap": empty}, {"controls": 0}, {"size": -1.0}, {"questions": [Asked("q", "q", "poem")]}):
        with pytest.raises(InputError):
            Bias("shapes", **{"swap": swap, "neutral": swap, **wrong})


def test_probabilities_of_answers(joint, square):
    vlm, prompt = joint.vlm, "what color is the circle ?"
    inputs, _, _ = vlm.prompts.prepare([[square]], [prompt])
    with torch.inference_mode():
        first = vlm.model(**inputs).logits[0, -1].log_softmax(-1)
        ids = vlm.processor.tokenizer.convert_tokens_to_ids(["red", "green", "yes", "no"])
        longer = torch.cat([inputs["input_ids"], torch.tensor([[ids[0]]])], 1)
        second = vlm.model(input_ids=longer, pixel_values=inputs["pixel_values"]).logits[0, -1].log_softmax(-1)
    p_red, p_green, p_both = first[ids[0]].exp(), first[ids[1]].exp(), (first[ids[0]] + second[ids[1]]).exp()
    found = answer_probabilities(vlm, [square], prompt, ["red", "green", "red green"])
    expected = torch.stack([p_red - p_both, p_green, p_both])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)
    values = {"red": 1.0, "green": 2.0, "red green": 10.0}
    mean = float((expected * torch.tensor([1.0, 2.0, 10.0])).sum() / expected.sum())
    assert expectation(vlm, [square], prompt, values) == pytest.approx(mean, rel=1e-5)
    (yes,) = yes_probabilities(vlm, [[square]], [prompt])
    assert float(yes) == pytest.approx(float(torch.sigmoid(first[ids[2]] - first[ids[3]])), rel=1e-5)
    both = yes_probabilities(vlm, [[square], [square]], [prompt, "a ? no yes two what color"])
    assert float(both[0]) == pytest.approx(float(yes), rel=1e-4)  # padding changes nothing
    for answers in (["red"], ["red", "red"], ["red", "red "]):
        with pytest.raises(InputError):
            answer_probabilities(vlm, [square], prompt, answers)


def test_classes_against_boxes(joint, square):
    seen = joint.see(square)
    found = check_classes(joint, seen, ["circle", "star"], threshold=0.5)
    scores = joint.boxes(seen, ["a photo of a circle", "a photo of a star"]).logits.sigmoid().max(0)
    for i, one in enumerate(found):
        assert one.score == pytest.approx(float(scores.values[i]))
        assert one.supported == (one.score >= 0.5)
        assert one.hallucinated == (one.yes >= 0.5 and not one.supported)
    own = check_classes(joint, seen, ["circle", "star"], eyes="own")
    assert [one.score for one in own] == [one.score for one in found]
    assert [one.yes for one in own] != [one.yes for one in found]
    for wrong in ([], "circle"):
        with pytest.raises(InputError, match="no class was given"):
            check_classes(joint, seen, wrong)
    with pytest.raises(InputError, match="text window"):
        check_classes(joint, seen, ["very " * 20 + "small star"])
    nouns = check_text(joint, seen, "a red circle and two stars", shapes_judge(), threshold=2.0)
    assert [(one.phrase, one.supported) for one in nouns] == [("red circle", False), ("star", False)]
    assert check_text(joint, seen, "nothing", NounJudge({"dog": ()})) == []


def test_measures_of_hallucinations_by_hand():
    def row(truth, own, score, first):
        return {"truth": truth, "own": own, "joint": own, "score": score, "first": first}

    rows = [
        row(True, 0.9, 0.8, True),
        row(False, 0.7, 0.2, True),
        row(True, 0.4, 0.7, False),
        row(False, 0.6, 0.4, False),
        row(False, 0.1, 0.1, False),
    ]
    found = measure(rows)
    assert (found["errs"], found["absent"], found["present"]) == (pytest.approx(2 / 3), 3, 2)
    assert found["score"] == 1.0
    assert found["own"] == pytest.approx(4 / 6)
    assert (found["threshold"], found["true_kept"], found["false_flagged"]) == (pytest.approx(0.5), 1.0, 1.0)
    assert found["false_yes_flagged"] == 1.0
    with pytest.raises(InputError, match="no class was given"):
        Hallucination("shapes", [])
    with pytest.raises(InputError, match="strength is 0 to 1"):
        Hallucination("shapes", ["circle"], strengths=[2.0])


@pytest.mark.parametrize(("text", "score"), [("7", 7), (" 10 ", 10), ("8/10", 8), ("3.", 3)])
def test_a_judges_score_is_read(text, score):
    assert parse_score(text) == score


@pytest.mark.parametrize("text", ["0", "11", "seven", "7 because", "", "7.5"])
def test_what_is_no_score(text):
    with pytest.raises(ValueError, match="not a whole number"):
        parse_score(text)
