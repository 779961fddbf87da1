"""Models whose layers lie on the CPU and on the disk: every number is the one of the model in one place."""

from __future__ import annotations

import pytest
import torch

import mllm_fast as mf
from mllm_fast.evaluation.samples import scenes
from mllm_fast.evaluation.studies.attention_share import AttentionShare
from mllm_fast.evaluation.worker import ModelChoice, rows_of
from mllm_fast.explain.registry import methods_without_detector
from mllm_fast.models.fingerprint import fingerprint
from mllm_fast.runtime import direct_passes

QUESTION = "Describe the image."


@pytest.fixture(scope="module")
def whole():
    return mf.VLM.from_pretrained("shapes", device="cpu")


@pytest.fixture(scope="module")
def spread(whole, tmp_path_factory):
    """The later half of the layers on the disk, and the vision tower."""
    parts = ("multi_modal_projector", "language_model.embed_tokens", "language_model.norm", "language_model.rotary_emb")
    places = {f"model.{part}": "cpu" for part in parts} | {"lm_head": "cpu", "model.vision_tower": "disk"}
    count = len(whole.text.layers)
    places |= {f"model.language_model.layers.{i}": "cpu" if i < count // 2 else "disk" for i in range(count)}
    folder = tmp_path_factory.mktemp("offload")
    vlm = mf.VLM.from_pretrained("shapes", device="cpu", device_map=places, offload_folder=folder)
    assert {weight.device.type for weight in vlm.model.parameters()} == {"cpu", "meta"}
    return vlm


@pytest.fixture(scope="module")
def sample():
    return scenes(1).list[0]


@pytest.fixture
def by_the_model(monkeypatch):
    """Layers in one place are run directly, which rounds otherwise: here the model itself runs them."""
    monkeypatch.setattr(direct_passes, "direct_decoder", lambda *_: None)


def test_explanations(whole, spread, sample, by_the_model):
    one, other = (vlm.explain(sample.image, QUESTION) for vlm in (whole, spread))
    assert one.text == other.text
    assert torch.equal(one.head_scores, other.head_scores)
    for method in methods_without_detector():
        assert torch.equal(one.heatmap(2, method), other.heatmap(2, method)), method
    assert one.verify(tokens=[2]) == other.verify(tokens=[2])
    assert one.project(2, 1, 0, space="embedding") == other.project(2, 1, 0, space="embedding")
    assert {weight.device.type for weight in spread.model.parameters()} == {"cpu", "meta"}


def test_knockouts_and_streams(whole, spread, sample):
    rule = mf.Knockout("image", "query", "from 2")
    one, other = (vlm.generate(sample.image, QUESTION, knockout=rule) for vlm in (whole, spread))
    assert one.token_ids == other.token_ids
    maps = [[step.heatmap() for step in vlm.stream(sample.image, QUESTION, explain=True)] for vlm in (whole, spread)]
    for one, other in zip(*maps, strict=True):  # the layers in one place are run directly, which rounds otherwise
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def test_contexts_go_from_one_to_the_other(whole, spread, sample, tmp_path):
    assert fingerprint(whole.model) == fingerprint(spread.model)
    path = tmp_path / "photo.safetensors"
    ctx = spread.compress(sample.image)
    ctx.save(path)
    question = "how many objects are there?"
    assert mf.Context.load(path, whole).ask(question).text == ctx.ask(question).text


def test_evaluations(whole, spread, sample, by_the_model):
    evaluation = AttentionShare(max_new_tokens=4)
    assert rows_of(evaluation, whole, sample) == rows_of(evaluation, spread, sample)


def test_auto(sample, whole, monkeypatch):
    vlm = ModelChoice(device="auto").load()
    assert vlm.generate(sample.image, QUESTION).text == whole.generate(sample.image, QUESTION).text
    monkeypatch.setattr("mllm_fast.models.loading.find_spec", lambda name: None)
    with pytest.raises(mf.InputError, match=r"pip install .*\[offload\]"):
        mf.VLM.from_pretrained("shapes", device="auto")
