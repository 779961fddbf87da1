"""The opposite direction: the language model's own eyes for the detector's heads."""

from __future__ import annotations

import json

import owl
import pytest
import tiny
import torch

import mllm_fast as mf
from mllm_fast.core.errors import InputError
from mllm_fast.evaluation.joint.reverse_quality import ReverseQuality
from mllm_fast.joint import Alignment, AlignmentConfig, JointModel, ReverseJoint
from mllm_fast.joint.checkpoint import WEIGHTS, read_settings, write_settings
from mllm_fast.joint.grids import resample
from mllm_fast.joint.reverse import reverse_embeddings, vision_embeddings
from mllm_fast.joint.train import CURVE, TrainConfig, train
from mllm_fast.joint.training_data import Scenes


@pytest.fixture(scope="module")
def pair():
    model, processor = tiny.BUILD["llava"]()
    detector = owl.detector()
    detector.model.float()
    return detector, mf.VLM(model, processor)


def test_the_embedding_is_what_the_projector_reads(pair):
    """The mean first, then the tokens on the detector's grid; projected, they are the model's own image embeddings."""
    detector, vlm = pair
    images = [Scenes(2)[i] for i in range(2)]
    tokens, tiles = vision_embeddings(vlm, images)
    with torch.no_grad():
        projected = vlm.model.model.multi_modal_projector(tokens)
    for i, image in enumerate(images):
        plain = vlm.explain(image, "what color is the circle ?", "red")
        torch.testing.assert_close(projected[i], plain.replay.embeds[0, plain.layout.positions("image")])
    given, wanted = reverse_embeddings(detector, vlm, images)
    for i, image in enumerate(images):
        vision = detector.see(image)
        placed = resample(tokens[i], tiles[i], vision.tile)
        torch.testing.assert_close(given[i, 1:], placed)
        torch.testing.assert_close(given[i, 0], placed.mean(0))
        torch.testing.assert_close(wanted[i], vision.tokens)


def test_it_learns_and_leaves_the_text_alone(pair, tmp_path):
    detector, vlm = pair
    image = Scenes(1)[0]
    before = vlm.generate(image, "what color is the circle ?", max_new_tokens=4).token_ids
    width = vision_embeddings(vlm, [image])[0].shape[-1]
    shape = AlignmentConfig("mlp", width, detector.width, 24)
    config = TrainConfig(4, 4, 2, 1e-2, held_out=0.1, every=4, direction="model-to-detector")
    train(detector, vlm, ("some/owl", "some/vlm"), Scenes(40), tmp_path, shape, config)
    curve = json.loads((tmp_path / CURVE).read_text())["curve"]
    assert curve[-1]["distance"] < 0.9 * curve[0]["distance"]
    assert read_settings(tmp_path)["direction"] == "model-to-detector"
    with pytest.raises(InputError, match="load it with ReverseJoint"):
        JointModel.from_pretrained(tmp_path, vlm=vlm)
    reverse = ReverseJoint(detector, Alignment.load(tmp_path / WEIGHTS), vlm)
    own, mapped = reverse.see(image)
    assert mapped.tokens.shape == own.tokens.shape
    boxes = reverse.boxes(image, ["a photo of a star"])
    torch.testing.assert_close(boxes.boxes, detector.boxes(mapped, ["a photo of a star"]).boxes)
    assert vlm.generate(image, "what color is the circle ?", max_new_tokens=4).token_ids == before
    with pytest.raises(InputError, match="two other models"):
        ReverseJoint(owl.detector(seed=1), Alignment.load(tmp_path / WEIGHTS), vlm)
    wrong = Alignment(AlignmentConfig("mlp", width, 31, 24))
    with pytest.raises(InputError, match="U gives 31 numbers"):
        ReverseJoint(detector, wrong, vlm)


def test_folders_of_the_usual_direction_are_refused(tmp_path):
    write_settings(tmp_path, "some/owl", "shapes", "whole")
    with pytest.raises(InputError, match="usual direction"):
        ReverseJoint.from_pretrained(tmp_path)


def test_the_command_and_its_report(run, tmp_path, shapes):
    """A short training on the embedded models; the detector's own boxes are those of the joint model's report."""
    options = ["--direction", "model-to-detector", "--count", "40", "--batch", "8", "--hidden", "32"]
    code, _, err = run("joint", "train", *options, "--out", tmp_path / "u")
    assert code == 0, err
    code, out, err = run("joint", "evaluate", "--joint", tmp_path / "u", "--count", "4", "--out", tmp_path, "--json")
    assert code == 0, err
    figures = json.loads(out)["reverse"]
    assert figures["pictures"] == 4
    assert figures["recall"]["own"] > 0.5
    assert figures["distance"] > 0


def test_the_report_by_hand(tmp_path):
    (tmp_path / WEIGHTS).write_bytes(b"-")
    write_settings(tmp_path, "some/owl", "shapes", "whole")
    study = ReverseQuality(str(tmp_path), ["dog"])
    rows = {
        "a": [{"things": 1, "own": [(0.9, True)], "mapped": [(0.8, False), (0.3, True)], "distance": 0.5}],
        "b": [{"things": 1, "own": [(0.8, True)], "mapped": [], "distance": 0.7}],
    }
    figures = study.report(rows).figures
    assert figures["recall"] == {"own": 1.0, "mapped": 0.0}  # 0.3 finds one, but behind a wrong box
    assert figures["average_precision"]["own"] == pytest.approx(1)
    assert figures["distance"] == pytest.approx(0.6)
    assert figures["things"] == 2
    with pytest.raises(InputError, match="--masks"):
        ReverseQuality(str(tmp_path), [])
