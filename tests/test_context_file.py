"""Equivalence 8: a saved and re-loaded context answers the same, bit for bit; and what a reader refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import mllm_fast as mf
from mllm_fast.context import file_format as context_file
from mllm_fast.runtime.shared_prefix import SharedPrefixDecoder

PROMPT = "describe this picture"
QUESTION = "what color is the circle ?"


@pytest.fixture
def ctx(vlm, picture):
    return vlm.compress(picture, keep=0.3, prompt=PROMPT, score="query")


def logits(vlm, ctx):
    ids = vlm.prompts.turn_ids(PROMPT, 1, QUESTION)
    session = SharedPrefixDecoder(vlm.text, ctx.keys, ctx.values, ctx.position, 1, vlm.backend)
    with session.recording(), torch.no_grad():
        return session.read([ids])


def test_a_loaded_context_is_the_saved_one(vlm, ctx, tmp_path):
    path = tmp_path / "photo.safetensors"
    assert ctx.save(path) == {}
    again = mf.Context.load(path, vlm, ctx.images)
    for name in ("keys", "values", "positions", "input_ids"):
        assert torch.equal(getattr(again, name), getattr(ctx, name))
        assert getattr(again, name).dtype == getattr(ctx, name).dtype
    for name in ("position", "prompt", "description", "settings", "images", "num_tokens", "prefix_length", "nbytes"):
        assert getattr(again, name) == getattr(ctx, name)
    assert torch.equal(logits(vlm, again), logits(vlm, ctx))
    assert (again.kept(1).boxes == ctx.kept(1).boxes).all()
    assert again.ask(QUESTION, max_new_tokens=4).token_ids == ctx.ask(QUESTION, max_new_tokens=4).token_ids
    assert again.explain(QUESTION, "red").heatmap(0).equal(ctx.explain(QUESTION, "red").heatmap(0))
    assert [p.name for p in tmp_path.iterdir()] == ["photo.safetensors"]


def test_int8_tells_its_error(vlm, ctx, tmp_path):
    path = tmp_path / "photo.safetensors"
    errors = ctx.save(path, storage="int8")
    again = mf.Context.load(path, vlm)
    for name, dim in (("keys", 2), ("values", 3)):
        got, exact = getattr(again, name), getattr(ctx, name)
        # half a step of each channel's, or token's, own scale
        assert ((got - exact).abs() <= exact.abs().amax(dim, keepdim=True) / 127 * 0.501).all()
        assert errors[name] == pytest.approx(float((got - exact).norm() / exact.norm()), rel=1e-5)
    assert 0 < max(errors.values()) < 0.02
    assert again.keys.dtype == ctx.keys.dtype
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["mllm_fast.context"])["storage_error"] == errors
        assert file.get_tensor("keys").dtype == torch.int8


def test_zero_keys_stay_zero(vlm, ctx, tmp_path):
    nothing = replace(ctx, keys=torch.zeros_like(ctx.keys))
    nothing.save(tmp_path / "a.safetensors", storage="int8")
    assert (mf.Context.load(tmp_path / "a.safetensors", vlm).keys == 0).all()


def edited(path, **changes):
    """The file with entries of its description changed; its checksum as it was, or made anew with renewed=True."""
    renewed = changes.pop("renewed", False)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    text = json.dumps(json.loads(metadata["mllm_fast.context"]) | changes, sort_keys=True)
    metadata["mllm_fast.context"] = text
    if renewed:
        metadata["mllm_fast.checksum"] = context_file.checksum(text, tensors)
    save_file(tensors, path, metadata)


def flip(path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "missing": (lambda p: p.unlink(), "there is no such file"),
    "empty": (lambda p: p.write_bytes(b""), "no context file, or one that was cut off"),
    "cut off": (lambda p: p.write_bytes(p.read_bytes()[:-100]), "no context file, or one that was cut off"),
    "half": (lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), "cut off"),
    "an image": (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(500)), "no context file"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "no context file"),
    "another safetensors file": (lambda p: save_file({"a": torch.zeros(2)}, p), "no context; mllm-fast compress makes"),
    "a bit of the last tensor": (lambda p: flip(p, -1), "damaged or edited"),
    "a bit in the middle": (lambda p: flip(p, p.stat().st_size * 2 // 3), "damaged or edited"),
    "an edited prompt": (lambda p: edited(p, prompt="describe that"), "damaged or edited"),
    "a newer format": (lambda p: edited(p, version=2, renewed=True), "format 2, this mllm-fast reads up to 1; update"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_wrong_with_a_file_is_said(built, picture, tmp_path, damage):
    vlm = mf.VLM(*built("llava"))
    path = tmp_path / "photo.safetensors"
    vlm.compress(picture, keep=0.3, prompt=PROMPT, score="query").save(path)
    spoil, message = DAMAGE[damage]
    spoil(path)
    with pytest.raises(mf.InputError, match=message):
        mf.Context.load(path, vlm)


UNFIT = {
    "not an object": ([], {}, "cannot be read"),
    "no version": ({"version": None}, {}, "cannot be read"),
    "no images": ({"images": None}, {}, "do not fit together"),
    "no keys": ({}, {"keys": None}, "do not fit together"),
    "keys of another shape": ({}, {"keys": lambda t: t[:, :, 1:].contiguous()}, "keys is torch.float64"),
    "keys of another type": ({}, {"keys": lambda t: t.float()}, "keys is torch.float64"),
    "positions that do not ascend": ({}, {"positions": lambda t: t.flip(1).contiguous()}, "positions ascend"),
    "positions beyond the prefix": ({}, {"positions": lambda t: t + 500}, "positions are 0 to"),
    "ids beyond the vocabulary": ({}, {"input_ids": lambda t: t + 10**6}, "outside the vocabulary"),
    "a position that is a text": ({"position": "7"}, {}, "position is a whole number from 1 to 512, got '7'"),
    "a position that is true": ({"position": True}, {}, "position is a whole number"),
    "a position below 1": ({"position": -5}, {}, "position is a whole number"),
    "a position far behind the window": ({"position": 10**12}, {}, "position is a whole number"),
    "a prompt that is no Unicode": ({"prompt": "\ud800"}, {}, "surrogates"),
    "a description that is a number": ({"description": 5}, {}, "description is a text"),
    "no settings": ({"settings": {}}, {}, "keep"),
    "settings of another type": ({"settings": [1]}, {}, "settings are an object"),
    "a first token beyond the vocabulary": ({"first_token": 10**9}, {}, "first_token is a whole number"),
    "a first token that is a text": ({"first_token": "x"}, {}, "first_token is a whole number"),
    "separators beyond the prefix": ({"separators": [10**9]}, {}, "separators is a whole number"),
    "keys that are no number": ({}, {"keys": lambda t: t * float("nan")}, "keys holds values that are not finite"),
    "values without end": ({}, {"values": lambda t: t + float("inf")}, "values holds values that are not finite"),
    **{
        f"an image with {name}": ({"images": change}, {}, message)
        for name, change, message in (
            ("no positions", {"positions": []}, "no positions"),
            ("positions twice", {"positions": [3, 3]}, "ascend"),
            ("a size of nothing", {"size": [-1, 0]}, "size is a whole number"),
            ("a vast size", {"size": [10**12, 5]}, "size is a whole number"),
            ("a canvas of texts", {"canvas": ["a", "b"]}, "canvas is a whole number"),
            ("a first tile before the first", {"first": -3}, "first is a whole number"),
            ("negative rows", {"tiles": [{"rows": -2, "cols": -8, "box": [0, 0, 1, 1]}]}, "rows is a whole number"),
            ("a box of nothing", {"tiles": [{"rows": 1, "cols": 1, "box": [0, 0, float("nan"), 1]}]}, "finite"),
        )
    },
}


@pytest.mark.parametrize("case", UNFIT)
def test_parts_that_do_not_fit(built, picture, tmp_path, case):
    """A file whose checksum is right may have been written by anybody."""
    changes, replaced, message = UNFIT[case]
    vlm = mf.VLM(*built("llava"))
    path = tmp_path / "photo.safetensors"
    vlm.compress(picture, keep=0.3, prompt=PROMPT, score="query").save(path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    for name, change in replaced.items():
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors[name])
    whole = json.loads(metadata["mllm_fast.context"])
    if isinstance(changes, dict) and isinstance(changes.get("images"), dict):  # a change of the first image
        changes = changes | {"images": [whole["images"][0] | changes["images"]]}
    text = json.dumps(changes if isinstance(changes, list) else whole | changes)
    metadata |= {"mllm_fast.context": text, "mllm_fast.checksum": context_file.checksum(text, tensors)}
    save_file(tensors, path, metadata)
    with pytest.raises(mf.InputError, match=message):
        mf.Context.load(path, vlm)


def test_pictures_to_draw_upon(built, picture, tmp_path):
    vlm = mf.VLM(*built("llava"))
    path = tmp_path / "photo.safetensors"
    vlm.compress(picture, keep=0.3, prompt=PROMPT, score="query").save(path)
    assert mf.Context.load(path, vlm, [picture.convert("RGBA")]).images[0].mode == "RGB"
    with pytest.raises(mf.InputError, match="made of other images"):
        mf.Context.load(path, vlm, [picture, picture])


def test_weights_written_by_way_of_data_show(built, picture, tmp_path):
    """As adapters are merged: neither the address nor the version of the weight changes."""
    vlm = mf.VLM(*built("llava"))
    path = tmp_path / "photo.safetensors"
    vlm.compress(picture, keep=0.3, prompt=PROMPT, score="query").save(path)
    weight = vlm.text.layers[1].mlp.up_proj.weight
    before = weight.data.clone()
    weight.data += 1e-3
    try:
        with pytest.raises(mf.InputError, match="another model"):
            mf.Context.load(path, vlm)
    finally:
        weight.data.copy_(before)
    assert mf.Context.load(path, vlm).num_tokens


def test_another_configuration_is_another_model(built, picture, tmp_path):
    vlm = mf.VLM(*built("llava"))
    path = tmp_path / "photo.safetensors"
    vlm.compress(picture, keep=0.3, prompt=PROMPT, score="query").save(path)
    config = vlm.model.config.text_config
    before = config.rms_norm_eps
    config.rms_norm_eps = 2 * before
    try:
        with pytest.raises(mf.InputError, match="another model"):
            mf.Context.load(path, vlm)
    finally:
        config.rms_norm_eps = before
    assert mf.Context.load(path, vlm).num_tokens


def test_a_loaded_context_does_not_live_in_its_file(vlm, ctx, tmp_path):
    path = tmp_path / "photo.safetensors"
    ctx.save(path)
    again = mf.Context.load(path, vlm)
    with open(path, "r+b") as file:  # in place, as no tool of this library writes
        size = file.seek(0, 2)
        file.seek(0)
        file.write(bytes(size))
    assert torch.equal(again.keys, ctx.keys)
    assert torch.equal(again.values, ctx.values)


def test_every_word_counts(built, picture, tmp_path):
    """A change of any 64-bit word of keys and values shows in the checksum."""
    vlm = mf.VLM(*built("llava"))
    ctx = vlm.compress(picture, keep=0.3, prompt=PROMPT, score="query")
    tensors = {"a": torch.arange(3 * 512 + 7, dtype=torch.float64), "b": ctx.keys[:1, :1, :2].clone()}
    whole = context_file.checksum("", tensors)
    for name, tensor in tensors.items():
        flat = tensor.view(-1)
        for i in range(len(flat)):
            before = flat[i].item()
            flat[i] = before + 1
            assert context_file.checksum("", tensors) != whole, (name, i)
            flat[i] = before
    first, second, rest = tensors["a"].split([512, 512, 519])
    assert context_file.checksum("", tensors | {"a": torch.cat([second, first, rest])}) != whole
    assert context_file.checksum("", tensors) == whole


def test_a_context_of_another_model(built, picture, tmp_path):
    vlm = mf.VLM(*built("llava"))
    path = tmp_path / "photo.safetensors"
    vlm.compress(picture, keep=0.3, prompt=PROMPT, score="query").save(path)
    for other in ("internvl", "qwen2_5_vl"):
        with pytest.raises(mf.InputError, match=r"another model, llava in float64 .* not with"):
            mf.Context.load(path, mf.VLM(*built(other)))
    weight = vlm.text.layers[1].mlp.up_proj.weight
    before = weight[3, 5].item()
    with torch.no_grad():
        weight[3, 5] += 1e-3
        with pytest.raises(mf.InputError, match="another model"):
            mf.Context.load(path, vlm)
        weight[3, 5] = before
    assert mf.Context.load(path, vlm).num_tokens


@pytest.mark.parametrize(
    ("path", "storage", "message"),
    [
        ("photo.pt", "full", "ending is one of .safetensors, got '?.pt"),
        ("gone/photo.safetensors", "full", "the folder .* does not exist"),
        ("photo.safetensors", "int4", "storage is one of full, int8, got 'int4'"),
    ],
)
def test_where_and_how_it_can_be_saved(built, picture, tmp_path, path, storage, message):
    ctx = mf.VLM(*built("llava")).compress(picture, keep=0.3, prompt=PROMPT, score="query")
    with pytest.raises(mf.InputError, match=message):
        ctx.save(tmp_path / path, storage)
    assert list(tmp_path.iterdir()) == []
