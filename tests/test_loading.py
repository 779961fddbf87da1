"""Loading by the same path as any hub model, and models that are loaded already."""

from __future__ import annotations

import json

import families
import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

import mllm_fast as mf
from mllm_fast.models.architectures import ARCHITECTURES
from mllm_fast.models.loading import image_side, parse_device, parse_dtype
from mllm_fast.runtime.detokenizer import token_texts

QUESTION = "what color is the circle ?"


def test_a_saved_model_loads_and_answers_the_same(family, picture, tmp_path):
    """Without torchvision too, where a processor with a video side cannot be built as a whole; with it transformers
    loads another class of image processor, whose pixels differ by roundings."""
    model, processor = tiny.BUILD[family]()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = mf.VLM.from_pretrained(tmp_path, device="cpu")
    same = type(loaded.processor.image_processor) is type(processor.image_processor)
    before = mf.VLM(model, processor if same else loaded.processor).explain(picture, QUESTION, "red blue")
    after = loaded.explain(picture, QUESTION, "red blue")
    assert loaded.model.config.model_type == family
    held, read = model.state_dict(), loaded.model.state_dict()
    assert all(torch.equal(held[name], read[name]) for name in held)
    # to rounding: where its operands lie in memory decides in what order some processors' matrix product adds up
    torch.testing.assert_close(before.head_scores, after.head_scores, rtol=1e-5, atol=1e-6)
    assert before.layout.images[0].tiles == after.layout.images[0].tiles


def test_the_embedded_model_is_a_llava(shapes):
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    assert type(shapes.model) is LlavaForConditionalGeneration
    assert isinstance(shapes.processor, LlavaProcessor)
    assert len(shapes.text.layers) >= 6
    assert shapes.text.num_heads >= 4


def test_text_only_model_in_memory():
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(mf.InputError, match="text-only model"):
        mf.VLM(LlamaForCausalLM(config), None)


def test_missing_tensors_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    model, processor = tiny.llava()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop(next(name for name in weights if "o_proj" in name))
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(mf.InputError, match="lack 1 tensors"):
        mf.VLM.from_pretrained(tmp_path, device="cpu")


def test_devices_and_dtypes():
    assert parse_device("cpu") == torch.device("cpu")
    assert parse_dtype(None, torch.device("cpu")) == torch.float32
    assert parse_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    assert parse_dtype(torch.float64, torch.device("cpu")) == torch.float64
    for device in ("cuda:99", "tpu", "meta"):
        with pytest.raises(mf.InputError):
            parse_device(device)


def test_image_side_keeps_what_has_no_video():
    from transformers import LlavaProcessor

    assert image_side(LlavaProcessor) is LlavaProcessor


def test_prompt_beyond_the_window(picture):
    model, processor = tiny.llava()
    model.config.text_config.max_position_embeddings = 20
    with pytest.raises(mf.InputError, match="window is 20"):
        mf.VLM(model, processor).generate(picture, QUESTION)


def test_options_reach_generate(shapes, picture):
    """Sampling as transformers has it; a cache or beams that an explanation cannot follow are refused."""
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": 50.0, "max_new_tokens": 6}
    said = {shapes.generate(picture, "describe the image", **options).text for _ in range(4)}
    assert len(said) > 1
    with pytest.raises(mf.InputError, match="num_beams=3"):
        shapes.explain(picture, "describe the image", num_beams=3)
    with pytest.raises(mf.InputError, match="cannot be used with a given answer"):
        shapes.explain(picture, "describe the image", "red", do_sample=True)
    with pytest.raises(mf.InputError, match="no image"):
        shapes.generate([], "describe the image")


def test_caches_are_accepted_or_refused_by_name(shapes, picture):
    before = shapes.text.config._attn_implementation
    with pytest.raises(mf.InputError, match="takes no cache_implementation"):
        shapes.explain(picture, "describe the image", cache_implementation="quantized")
    assert shapes.text.config._attn_implementation == before
    words = shapes.explain(picture, "describe the image", cache_implementation="static").tokens
    assert words == shapes.explain(picture, "describe the image").tokens
    assert shapes.generate(picture, "describe the image", cache_implementation="static").text


def test_token_texts_keep_spaces_and_split_characters():
    class Bytes:
        """A tokenizer whose tokens are single bytes."""

        def decode(self, ids):
            return bytes(ids).decode("utf-8", errors="replace")

    ids = list("né 🙂!".encode())
    texts = token_texts(Bytes(), ids)
    assert "".join(texts) == "né 🙂!"
    assert texts == ["n", "", "é", " ", "", "", "", "🙂", "!"]


def test_every_adapter_has_a_tiny_model():
    tried = {families.BUILD[name]()[0].config.model_type for name in families.BUILD} | set(tiny.FAMILIES)
    assert set(ARCHITECTURES) <= tried


@pytest.mark.filterwarnings("ignore")  # peft's own
def test_a_folder_of_adapters_loads_their_model(picture, tmp_path):
    peft = pytest.importorskip("peft")
    model, processor = tiny.llava()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "base")
    base = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["o_proj", "v_proj", "lm_head"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = mf.VLM.from_pretrained(tmp_path / "adapter", device="cpu").explain(picture, QUESTION, "red blue")
    wanted = mf.VLM(adapted.merge_and_unload(), processor).explain(picture, QUESTION, "red blue")
    torch.testing.assert_close(loaded.head_scores, wanted.head_scores, rtol=1e-4, atol=1e-5)

    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for wrong, message in ((None, "names no base_model"), (str(tmp_path), "which has no config.json")):
        (tmp_path / "adapter" / "adapter_config.json").write_text(
            json.dumps(settings | {"base_model_name_or_path": wrong})
        )
        with pytest.raises(mf.InputError, match=message):
            mf.VLM.from_pretrained(tmp_path / "adapter")


def test_a_processor_without_a_patch_size(picture):
    """As old checkpoints have it; the number of image tokens follows from the config."""
    model, processor = tiny.llava()
    wanted = mf.VLM(model, processor).generate(picture, QUESTION, max_new_tokens=4).input_ids
    processor.patch_size, processor.num_additional_image_tokens = None, 0
    assert torch.equal(mf.VLM(model, processor).generate(picture, QUESTION, max_new_tokens=4).input_ids, wanted)


@pytest.mark.parametrize("kind", ["internvl_chat", "llava_llama", "llava_qwen", "multi_modality"])
def test_the_authors_own_checkpoints_are_named(kind, tmp_path):
    model, processor = tiny.llava()
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"model_type": kind}))
    with pytest.raises(mf.InputError, match=f"{kind}.*load the converted checkpoint"):
        mf.VLM.from_pretrained(tmp_path)


def test_progress_is_shown_to_whom_it_is_asked_for(tmp_path, capfd):
    model, processor = tiny.llava()
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    capfd.readouterr()
    mf.VLM.from_pretrained(tmp_path, device="cpu")
    assert capfd.readouterr() == ("", "")
    mf.VLM.from_pretrained(tmp_path, device="cpu", progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "Loading weights" in err
