"""The joint model as its authors run it: the whole image for both models, and their released W."""

from __future__ import annotations

import json

import numpy as np
import owl
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import mllm_fast as mf
from mllm_fast.core.errors import InputError
from mllm_fast.joint import Alignment, AlignmentConfig, JointModel
from mllm_fast.joint.checkpoint import WEIGHTS, read_settings
from mllm_fast.joint.released import read_released
from mllm_fast.joint.train import TrainConfig, schedule
from mllm_fast.joint.whole_image import sees_whole

WIDE = Image.fromarray(np.random.default_rng(5).integers(0, 256, (40, 90, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def vlm(built):
    return mf.VLM(*built("llava"))


def test_both_models_see_the_whole_image(vlm):
    """Squashed to a square, without a crop; the caller's model keeps its processor."""
    images = vlm.processor.image_processor
    assert images.do_center_crop, "this test needs a processor that crops"
    joint = owl.joint(vlm)
    seen = joint.see(WIDE)
    assert seen.tile.box == seen.vision.tile.box == (0.0, 0.0, 90.0, 40.0)
    inputs, _ = joint.vlm.prepare(WIDE, "x")
    size = images.crop_size["width"], images.crop_size["height"]
    squashed = WIDE.resize(size, Image.Resampling(images.resample))
    plain, _ = vlm.prepare(squashed, "x")  # already of the crop's size, so it is neither resized nor cropped
    torch.testing.assert_close(inputs["pixel_values"], plain["pixel_values"], rtol=0, atol=1e-5)
    assert vlm.processor.image_processor.do_center_crop
    assert vlm.processor.image_processor is images
    crop = JointModel(owl.detector(), joint.alignment, vlm, "crop")
    assert crop.vlm is vlm
    left, _, right, _ = crop.see(WIDE).tile.box
    assert (left, right) == pytest.approx((25, 65))
    assert joint.vlm.text is vlm.text
    assert sees_whole(joint.vlm) is joint.vlm
    with pytest.raises(InputError, match="view"):
        JointModel(owl.detector(), joint.alignment, vlm, "half")


def test_the_embedded_joint_model_sees_the_whole_image(shapes):
    joint = JointModel.from_pretrained("shapes", vlm=shapes)
    assert joint.view == "whole"
    assert joint.see(WIDE).note == ""


def test_folders_of_earlier_releases_crop(tmp_path):
    (tmp_path / "joint.json").write_text('{"format": 1, "detector": "a", "model": "b"}')
    assert read_settings(tmp_path) == {"detector": "a", "model": "b", "view": "crop", "direction": "detector-to-model"}
    (tmp_path / "joint.json").write_text('{"format": 1, "detector": "a", "model": "b", "view": "half"}')
    with pytest.raises(InputError, match="view"):
        read_settings(tmp_path)


def deep() -> tuple[nn.Module, dict]:
    """The deep MLP by the layers' names in the authors' files, and what it computes, written out."""
    torch.manual_seed(0)
    linear = {
        "input_layer": nn.Linear(6, 8),
        "hidden_layers.0": nn.Linear(8, 8),
        "hidden_layers.1": nn.Linear(8, 8),
        "output_layer": nn.Linear(8, 5),
    }
    steps = [module for one in linear.values() for module in (one, nn.ReLU())][:-1]
    named = {f"{name}.{part}": t for name, one in linear.items() for part, t in one.state_dict().items()}
    return nn.Sequential(*steps), named


def projector() -> tuple[nn.Module, dict]:
    torch.manual_seed(1)
    first, second = nn.Linear(6, 5), nn.Linear(5, 5)
    named = {
        f"token_projection.linear_{i}.{part}": t
        for i, one in ((1, first), (2, second))
        for part, t in one.state_dict().items()
    }
    return nn.Sequential(first, nn.GELU(), second), named


@pytest.mark.parametrize("made", [deep, projector])
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_released_w_gives_what_its_layers_give(tmp_path, made, ending):
    module, named = made()
    path = tmp_path / f"w{ending}"
    torch.save(named, path) if ending == ".pth" else save_file(named, str(path))
    alignment = read_released(path)
    tokens = torch.randn(2, 7, 6)
    with torch.no_grad():
        torch.testing.assert_close(alignment(tokens), module(tokens), rtol=1e-6, atol=1e-6)
    assert alignment.pair == {}
    alignment.save(tmp_path / "again.safetensors")
    again = Alignment.load(tmp_path / "again.safetensors")
    with torch.no_grad():
        assert torch.equal(again(tokens), alignment(tokens))


class Evil:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "no such file"),
        (b"nothing", "cannot be read as weights"),
        ({"a.weight": torch.zeros(2, 2)}, "is no released W"),
        ([torch.zeros(2)], "no weights by name"),
        ({**deep()[1], "extra.weight": torch.zeros(2, 2)}, "is no released W"),
        ({**deep()[1], "output_layer.weight": torch.zeros(5, 9)}, "do not fit each other"),
        ({"a": Evil()}, "cannot be read as weights"),
    ],
)
def test_files_that_hold_no_released_w(tmp_path, content, why, capfd):
    path = tmp_path / "w.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=why):
        read_released(path)
    assert capfd.readouterr().out == ""  # nothing in the file was run


def test_the_command_makes_a_joint_model(run, tmp_path, vlm):
    torch.save(deep()[1], tmp_path / "w.pth")
    options = ["--detector", "some/owl", "--model", "some/llava", "--out", tmp_path / "joint"]
    code, out, err = run("joint", "import", tmp_path / "w.pth", *options, "--json")
    assert code == 0, err
    shape = json.loads(out)["shape"]
    assert (shape["kind"], shape["depth"], shape["norm"], shape["activation"]) == ("mlp", 3, False, "relu")
    found = read_settings(tmp_path / "joint")
    assert found == {"detector": "some/owl", "model": "some/llava", "view": "whole", "direction": "detector-to-model"}
    assert Alignment.load(tmp_path / "joint" / WEIGHTS).config.hidden == 8
    code, _, err = run("joint", "import", tmp_path / "w.pth", *options)
    assert code == 2
    assert "holds a trained alignment" in err


def test_a_transformer_as_wide_as_the_language_model():
    w = Alignment(AlignmentConfig("transformer", 6, 8, 12, layers=2, heads=4, width=8))
    assert w.body[0].weight.shape == (8, 6)
    assert w.body[1].layers[0].linear1.weight.shape == (12, 8)
    assert w(torch.randn(3, 5, 6)).shape == (3, 5, 8)
    with pytest.raises(InputError, match="heads do not divide the 8"):
        AlignmentConfig("transformer", 6, 8, 12, heads=3, width=8)


def test_a_constant_rate():
    assert TrainConfig(schedule="constant").schedule == "constant"
    assert schedule(99, 100) < 0.02
    with pytest.raises(InputError, match="schedule"):
        TrainConfig(schedule="linear")
