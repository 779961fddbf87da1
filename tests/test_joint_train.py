"""Training W, and fine-tuning on E, between tiny random models."""

from __future__ import annotations

import json

import numpy as np
import owl
import pytest
import tiny
import torch
from PIL import Image

import mllm_fast as mf
from mllm_fast.core.errors import EndsRunError, InputError
from mllm_fast.joint import Alignment, AlignmentConfig, JointModel
from mllm_fast.joint import train as training
from mllm_fast.joint.checkpoint import SETTINGS, WEIGHTS, read_settings
from mllm_fast.joint.finetune import LORA, FinetuneConfig, finetune
from mllm_fast.joint.train import CHECKPOINT, CURVE, TrainConfig, schedule, train
from mllm_fast.joint.training_data import Folder, Scenes, embeddings
from mllm_fast.joint.weights_id import weights_name

CONFIG = TrainConfig(epochs=4, batch=4, accumulate=2, rate=1e-2, held_out=0.1, every=2)


@pytest.fixture(scope="module")
def pair():
    model, processor = tiny.BUILD["llava"]()
    detector = owl.detector()
    detector.model.float()
    return detector, mf.VLM(model, processor)


def shape(vlm, kind="mlp"):
    return AlignmentConfig(kind, 30, vlm.text.config.hidden_size, hidden=24, layers=1, heads=2)


def test_embeddings_are_both_models_own(pair):
    detector, vlm = pair
    images = [Scenes(3)[i] for i in range(3)]
    given, wanted = embeddings(detector, vlm, images)
    for i, image in enumerate(images):
        one = JointModel(detector, Alignment(shape(vlm)), vlm).see(image)
        assert given[i].shape == (16, 30)  # resampled from 5 x 5
        plain = vlm.explain(image, "what color is the circle ?", "red")
        torch.testing.assert_close(wanted[i], plain.replay.embeds[0, plain.layout.positions("image")])
        assert one.vision.tokens.shape == (26, 30)


def test_w_learns_and_a_stopped_run_goes_on_as_if_it_had_not(pair, tmp_path, monkeypatch):
    detector, vlm = pair
    names = ("some/owl", "some/vlm")
    whole = train(detector, vlm, names, Scenes(40), tmp_path / "whole", shape(vlm), CONFIG)
    curve = json.loads((tmp_path / "whole" / CURVE).read_text())["curve"]
    assert curve[0]["step"] == 0
    assert curve[-1]["step"] == 16  # 36 taught images, 8 a step, four epochs
    assert curve[-1]["distance"] < 0.9 * curve[0]["distance"]
    assert not (tmp_path / "whole" / CHECKPOINT).exists()
    assert read_settings(tmp_path / "whole") == {
        "detector": "some/owl",
        "model": "some/vlm",
        "view": "whole",
        "direction": "detector-to-model",
    }

    def stop(done, total, what):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(detector, vlm, names, Scenes(40), tmp_path / "parts", shape(vlm), CONFIG, stop)
    assert (tmp_path / "parts" / CHECKPOINT).exists()
    seen: list[int] = []
    parts = train(
        detector, vlm, names, Scenes(40), tmp_path / "parts", shape(vlm), CONFIG, lambda done, *_: seen.append(done)
    )
    assert min(seen) == 4  # from the last checkpoint
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(one, other)
    loaded = Alignment.load(tmp_path / "parts" / WEIGHTS)
    assert loaded.pair == {"owl": weights_name(detector.model), "vlm": weights_name(vlm.model)}
    with pytest.raises(InputError, match="holds a trained alignment"):
        train(detector, vlm, names, Scenes(40), tmp_path / "parts", shape(vlm), CONFIG)


def test_accumulated_batches_are_one_large_one(pair, tmp_path):
    detector, vlm = pair
    once = TrainConfig(epochs=1, batch=8, rate=1e-3, held_out=0.1, every=100)
    twice = TrainConfig(epochs=1, batch=4, accumulate=2, rate=1e-3, held_out=0.1, every=100)
    found = [
        train(detector, vlm, ("a", "b"), Scenes(40), tmp_path / str(i), shape(vlm), config)
        for i, config in enumerate((once, twice))
    ]
    for one, other in zip(*(alignment.parameters() for alignment in found), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5)


def test_a_run_of_other_settings_is_not_mixed(pair, tmp_path):
    detector, vlm = pair

    def stop(done, *_):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(detector, vlm, ("a", "b"), Scenes(40), tmp_path, shape(vlm), CONFIG, stop)
    with pytest.raises(InputError, match=r"other settings \(pictures\)"):
        train(detector, vlm, ("a", "b"), Scenes(41), tmp_path, shape(vlm), CONFIG)
    with pytest.raises(InputError, match="too few"):
        train(detector, vlm, ("a", "b"), Scenes(8), tmp_path / "few", shape(vlm), CONFIG)


def test_pictures_that_cannot_be_used_are_counted(pair, tmp_path):
    detector, vlm = pair
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(20):
        Scenes(20)[i].save(folder / f"{i}.png")
    (folder / "3.png").write_bytes(b"no image")
    Image.new("RGB", (4, 90)).save(folder / "4.png")
    pictures = Folder(folder)
    config = TrainConfig(batch=9, rate=1e-3, held_out=0.1)
    train(detector, vlm, ("a", "b"), pictures, tmp_path / "out", shape(vlm), config)
    skipped = json.loads((tmp_path / "out" / CURVE).read_text())["skipped"]
    held = np.random.default_rng(0).permutation(20)[:2]
    assert skipped == 2 - sum(pictures._paths[i].name in ("3.png", "4.png") for i in held)
    for path in folder.glob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(EndsRunError, match="no image of a batch can be used"):
        train(detector, vlm, ("a", "b"), pictures, tmp_path / "none", shape(vlm), config)


def test_settings_that_make_no_sense():
    for wrong in ({"batch": 0}, {"precision": "fp8"}, {"held_out": 1.0}, {"rate": 0.0}):
        with pytest.raises(InputError):
            TrainConfig(**wrong)
    for wrong in ({"rank": 0}, {"prompts": ()}, {"precision": "fp8"}):
        with pytest.raises(InputError):
            FinetuneConfig(**wrong)
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 3, rel=0.01)
    assert max(rates) == rates[2] > rates[50] > rates[99] > 0


def test_mixed_precision_trains_too(pair, tmp_path):
    detector, vlm = pair
    config = TrainConfig(epochs=2, batch=8, rate=3e-3, held_out=0.1, precision="bf16")
    train(detector, vlm, ("a", "b"), Scenes(40), tmp_path, shape(vlm, "transformer"), config)
    curve = json.loads((tmp_path / CURVE).read_text())["curve"]
    assert curve[-1]["distance"] < curve[0]["distance"]


def test_without_accelerate(pair, tmp_path, monkeypatch):
    detector, vlm = pair
    monkeypatch.setitem(__import__("sys").modules, "accelerate", None)
    with pytest.raises(InputError, match=r"\[joint\]"):
        training.train(detector, vlm, ("a", "b"), Scenes(40), tmp_path, shape(vlm), CONFIG)


def test_fine_tuning_learns_and_leaves_the_model_as_it_was(tmp_path):
    model, processor = tiny.BUILD["llava"]()
    model.generation_config.suppress_tokens = [model.config.image_token_id]  # which random weights would say
    detector = owl.detector()
    detector.model.float()
    vlm = mf.VLM(model, processor)
    torch.manual_seed(0)
    joint = JointModel(detector, Alignment(shape(vlm)), vlm)
    detector.model.save_pretrained(tmp_path / "owl")
    detector.processor.save_pretrained(tmp_path / "owl")
    vlm.model.save_pretrained(tmp_path / "vlm")
    vlm.processor.save_pretrained(tmp_path / "vlm")
    before = {name: tensor.clone() for name, tensor in vlm.model.state_dict().items()}
    w = {name: tensor.clone() for name, tensor in joint.alignment.state_dict().items()}
    question = "what color is the circle ?"
    config = FinetuneConfig((question,), rank=4, epochs=6, batch=2, rate=2e-2, max_new_tokens=4)
    names = (str(tmp_path / "owl"), str(tmp_path / "vlm"))
    losses = finetune(joint, names, Scenes(4), tmp_path / "tuned", config)
    assert np.mean(losses[-2:]) < 0.5 * np.mean(losses[:2])
    after = vlm.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(joint.alignment.state_dict()[name], tensor) for name, tensor in w.items())
    assert not any("lora" in name for name, _ in vlm.model.named_modules())
    assert "get_image_features" not in vars(vlm.model.model)
    assert read_settings(tmp_path / "tuned")["lora"] == LORA
    tuned = JointModel.from_pretrained(tmp_path / "tuned", vlm=vlm)
    assert tuned.vlm is not vlm
    with pytest.raises(InputError, match="fine-tuned already"):
        finetune(tuned, names, Scenes(4), tmp_path / "again", config)
    picture = Scenes(4)[0]
    said = tuned.generate(picture, question, max_new_tokens=4)
    assert said.token_ids == vlm.generate(picture, question, max_new_tokens=4).token_ids  # what it was taught
    assert said.token_ids != joint.generate(picture, question, max_new_tokens=4).token_ids
    with pytest.raises(InputError, match="holds a trained alignment"):
        finetune(joint, names, Scenes(4), tmp_path / "tuned", config)
    tiny.BUILD["llava"](seed=5)[0].save_pretrained(tmp_path / "vlm")
    with pytest.raises(InputError, match="trained on another language model"):
        JointModel.from_pretrained(tmp_path / "tuned")
    assert (tmp_path / "tuned" / SETTINGS).exists()
