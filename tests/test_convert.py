"""Checkpoints of InternVL's own code, tried on tiny ones in the original layout."""

import json

import internvl_original as original
import pytest
import safetensors
import tiny
import torch

import mllm_fast as mf
from mllm_fast.models.internvl_chat import convert
from mllm_fast.models.internvl_tokenizer import read_tokenizer

sentencepiece = pytest.importorskip("sentencepiece")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """The files of a tokenizer whose texts begin without a space of their own, and how many pieces it has."""
    folder = tmp_path_factory.mktemp("pieces")
    return folder, original.sentencepiece_model(folder, dummy_prefix=False)


def _checkpoint(folder, pieces, files=1, wide=False, **changes):
    settings = original.config(pieces[1] + len(original.MARKS), wide=wide)
    folder.mkdir()
    for file in pieces[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = original.weights(settings)
    original.write(folder, settings | changes, tensors, files)
    return settings, {name: t.double() for name, t in tensors.items()}


@pytest.mark.parametrize(("wide", "files"), [(False, 1), (True, 3)])
def test_logits_are_those_of_the_authors_code(wide, files, pieces, picture, tmp_path):
    settings, tensors = _checkpoint(tmp_path / "original", pieces, files, wide=wide)
    count = convert(tmp_path / "original", tmp_path / "new")
    # a matrix of queries, keys and values becomes three, and so does its bias
    assert count == len(tensors) + 2 * sum("qkv" in name for name in tensors)
    vlm = mf.VLM.from_pretrained(tmp_path / "new", device="cpu", dtype="float64")
    inputs, _ = vlm.prepare(picture, "what color is the circle ?")
    ids = inputs["input_ids"][0]
    x = tensors["language_model.model.tok_embeddings.weight"][ids]
    mark = vlm.processor.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    features = original.image_features(settings, tensors, inputs["pixel_values"].double())
    assert int((ids == mark).sum()) == features.shape[0] * 16 > 16  # several tiles
    x[ids == mark] = features.flatten(0, 1)
    with torch.inference_mode(), tiny.eager(vlm.model):
        logits = vlm.model(**inputs).logits[0]
    # transformers' norms and angles are in float32: 2**-24 of logits of some units, over the layers
    torch.testing.assert_close(logits, original.internlm2_logits(tensors, x), rtol=0, atol=2e-5)
    assert ids[0] == 1  # <s>, as the authors' tokenizer puts it there
    assert vlm.explain(picture, "what color is the circle ?", max_new_tokens=3).head_scores.shape[1:] == (
        original.TLAYERS,
        original.THEADS,
    )


@pytest.mark.parametrize("dummy_prefix", [False, True])
def test_texts_become_sentencepiece_s_own_pieces(dummy_prefix, tmp_path):
    """Each stretch between marks is one text for SentencePiece, as in the authors' tokenizer."""
    pieces = original.sentencepiece_model(tmp_path, dummy_prefix)
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = read_tokenizer(tmp_path)
    for text in ("what color is the star ?", " two  spaces", "a\nnew line", "é ☃ unheard", "\n", "?"):
        assert tokenizer(text, add_special_tokens=False).input_ids == own.encode(text), text
    start, end = pieces + 2, pieces + 1
    got = tokenizer("<|im_start|>user\nwhat<|im_end|>\n", add_special_tokens=False).input_ids
    assert got == [start, *own.encode("user\nwhat"), end, *own.encode("\n")]
    assert tokenizer("no").input_ids == [1, *own.encode("no")]
    assert tokenizer.decode(own.encode("what color ?")) == "what color ?"


@pytest.mark.parametrize(("template", "between"), [("Hermes-2", ""), ("internlm2-chat", ""), ("internvl2_5", "\n")])
def test_the_conversation_is_the_authors(template, between, pieces, picture, tmp_path):
    """Between turns stands a new line in the latest of their templates alone."""
    _checkpoint(tmp_path / "original", pieces, template=template)
    convert(tmp_path / "original", tmp_path / "new", system="no \"star\" 'left' {{ 1 }} \U0001f600")
    vlm = mf.VLM.from_pretrained(tmp_path / "new", device="cpu")
    processor = vlm.processor
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color ?"}]}
    said = f"<|im_start|>system\nno \"star\" 'left' {{{{ 1 }}}} \U0001f600<|im_end|>{between}"
    asked = f"<|im_start|>user\n<IMG_CONTEXT>\nwhat color ?<|im_end|>{between}<|im_start|>assistant\n"
    assert processor.apply_chat_template([turn], add_generation_prompt=True) == said + asked
    own = {"role": "system", "content": "yes"}
    assert processor.apply_chat_template([own, turn]) == (
        f"<|im_start|>system\nyes<|im_end|>{between}" + asked.removesuffix("<|im_start|>assistant\n")
    )
    assert vlm.prepare(picture, "what color ?")
    stops = json.loads((tmp_path / "new" / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [2, pieces[1] + 1]  # </s> and <|im_end|>


@pytest.mark.parametrize("language", ["qwen2", "llama"])
def test_other_language_models_keep_their_names(language, pieces, picture, tmp_path):
    settings = original.config(pieces[1] + len(original.MARKS), language)
    (tmp_path / "original").mkdir()
    read_tokenizer(pieces[0]).save_pretrained(tmp_path / "original")  # their checkpoints have tokenizer.json
    tensors = original.weights(settings)
    original.write(tmp_path / "original", settings, tensors)
    convert(tmp_path / "original", tmp_path / "new")
    vlm = mf.VLM.from_pretrained(tmp_path / "new", device="cpu", dtype="float32")
    got = vlm.model.state_dict()
    assert torch.equal(
        got["model.language_model.layers.1.mlp.up_proj.weight"],
        tensors["language_model.model.layers.1.mlp.up_proj.weight"],
    )
    assert torch.equal(got["lm_head.weight"], tensors["language_model.lm_head.weight"])
    assert vlm.generate(picture, "what color is the circle ?", max_new_tokens=2).tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ps_version": "v1"}, "ps_version is 'v1'"),
        ({"template": "vicuna_v1.1"}, "Hermes-2, internlm2-chat, internvl2_5, got 'vicuna_v1.1'"),
        ({"llm_config": "qwen2"}, "llm_config is an object"),
        ({"downsample_ratio": None}, "downsample_ratio is a number above 0, got None"),
        ({"max_dynamic_patch": "x"}, "max_dynamic_patch is a number above 0, got 'x'"),
        ({"pad2square": True}, "pad2square is True"),
        ({"model_type": "internvl"}, "only models of the type 'internvl_chat'"),
        ({"llm_config": {"model_type": "phi3"}}, "internlm2, llama, qwen2, qwen3, got 'phi3'"),
        ({"downsample_ratio": 1.0}, "multi_modal_projector.layer_norm.*by config.json and"),
    ],
)
def test_what_cannot_be_converted_is_refused_before_anything_is_written(change, message, pieces, tmp_path):
    _checkpoint(tmp_path / "original", pieces, **change)
    with pytest.raises(mf.InputError, match=message):
        convert(tmp_path / "original", tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["original"]


@pytest.mark.parametrize(("absent", "message"), [("ps_version", "'v1'"), ("use_thumbnail", "False")])
def test_absent_settings_are_those_of_the_authors_class(absent, message, pieces, tmp_path):
    _checkpoint(tmp_path / "original", pieces)
    path = tmp_path / "original" / "config.json"
    settings = json.loads(path.read_text())
    del settings[absent]
    path.write_text(json.dumps(settings))
    with pytest.raises(mf.InputError, match=f"{absent} is {message}"):
        convert(tmp_path / "original", tmp_path / "new")


def test_tiles_that_the_config_leaves_out(pieces, tmp_path):
    _checkpoint(tmp_path / "original", pieces)
    path = tmp_path / "original" / "config.json"
    settings = json.loads(path.read_text())
    del settings["dynamic_image_size"], settings["max_dynamic_patch"]
    path.write_text(json.dumps(settings))
    convert(tmp_path / "original", tmp_path / "new")
    images = mf.VLM.from_pretrained(tmp_path / "new", device="cpu").processor.image_processor
    assert (images.crop_to_patches, images.max_patches) == (False, 6)


@pytest.mark.parametrize("name", ["generation_config.json", "preprocessor_config.json", "config.json"])
def test_files_that_hold_no_object(name, pieces, tmp_path):
    _checkpoint(tmp_path / "original", pieces)
    (tmp_path / "original" / name).write_text("[1]")
    with pytest.raises(mf.InputError, match=f"{name} holds an object of settings, got a list"):
        convert(tmp_path / "original", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_full_disk(pieces, tmp_path, monkeypatch):
    def full(*_):
        raise safetensors.SafetensorError("Error while serializing: No space left on device (os error 28)")

    _checkpoint(tmp_path / "original", pieces)
    monkeypatch.setattr("mllm_fast.models.internvl_chat.save_file", full)
    with pytest.raises(mf.InputError, match=r"cannot be written: .*No space left"):
        convert(tmp_path / "original", tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["original"]


def test_damaged_weights_are_named(pieces, tmp_path):
    settings, tensors = _checkpoint(tmp_path / "original", pieces)
    for path in (tmp_path / "original").glob("*.safetensors"):
        path.unlink()
    less = {n: t.float() for n, t in tensors.items() if n != "language_model.model.layers.1.attention.wo.weight"}
    for changed, message in (
        (less, r"the weights lack what becomes model.language_model.layers.1.self_attn.o_proj.weight"),
        (less | {"adapter.weight": torch.zeros(2)}, "'adapter.weight', which no part"),
    ):
        original.write(tmp_path / "original", settings, changed)
        with pytest.raises(mf.InputError, match=message):
            convert(tmp_path / "original", tmp_path / "new")
        assert not (tmp_path / "new").exists()


def test_the_command(pieces, tmp_path, run):
    _checkpoint(tmp_path / "original", pieces)
    command = ["convert", str(tmp_path / "original"), "--out", str(tmp_path / "new")]
    code, out, _ = run(*command)
    assert code == 0
    assert "mllm-fast explain --model" in out
    code, _, err = run(*command)
    assert code == 2
    assert "exists already" in err
    code, _, err = run("convert", str(tmp_path / "none"), "--out", str(tmp_path / "other"))
    assert code == 2
    assert "no such model folder" in err
