"""Prompts without an image, and language models without eyes."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import mllm_fast as mf
from mllm_fast.core.errors import EndsRunError
from mllm_fast.evaluation.studies.text_only_model import load_text_model

QUESTION = "what color is the circle ?"


def log_probs(model, ids):
    with torch.no_grad(), tiny.eager(model):
        return torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], -1)


def test_text_alone(family, built, picture, tmp_path):
    vlm = mf.VLM(*built(family))
    ex = vlm.explain(None, QUESTION, "red circle")
    ids = vlm.processor.tokenizer(vlm.prompts.text(0, QUESTION)).input_ids
    assert ex.input_ids.tolist() == ids + ex.token_ids
    expected = log_probs(vlm.model, ids + ex.token_ids)[len(ids) - 1]
    found = dict(ex.project(0, ex.num_layers, k=10**6))
    words = [vlm.processor.tokenizer.decode([i]) for i in range(len(expected))]
    torch.testing.assert_close(torch.tensor([found[word] for word in words]), expected.float(), rtol=0, atol=1e-5)
    assert (ex.position_scores(0, "all").abs().sum(0) > 0).sum() == len(ids)
    one = vlm.generate(None, QUESTION, max_new_tokens=4)
    assert [step.token for step in vlm.stream(None, QUESTION, max_new_tokens=4)] == one.tokens
    both = vlm.generate([None, None], [QUESTION, "describe this"], max_new_tokens=4)
    assert both[0].token_ids == one.token_ids
    with pytest.raises(mf.InputError, match="no image to lay a map on"):
        ex.heatmap(0)
    for ending in (".png", ".html"):  # the text, coloured
        ex.save(tmp_path / f"x{ending}")
        assert (tmp_path / f"x{ending}").stat().st_size > 1000
    with pytest.raises(mf.InputError, match="no patches to knock out"):
        ex.verify()
    ex.save(tmp_path / "x.json")
    with pytest.raises(mf.InputError, match="no image to compress"):
        vlm.compress(None)
    with pytest.raises(mf.InputError, match="images for all of its prompts or for none"):
        vlm.generate([None, picture], [QUESTION, QUESTION])


@pytest.fixture
def folder(built, tmp_path):
    """A language model of other sizes, with the same words."""
    tokenizer = built("llava")[1].tokenizer
    torch.manual_seed(5)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), head_dim=8, num_key_value_heads=1, **sizes))
    model.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_language_model(built, folder):
    vlm = mf.VLM(*built("llava"))
    other = load_text_model(str(folder), vlm)
    assert other.model.dtype == vlm.model.dtype
    ex = other.explain(None, QUESTION, "red")
    assert ex.input_ids.tolist() == vlm.explain(None, QUESTION, "red").input_ids.tolist()
    assert ex.head_scores.shape == (1, 2, 3)
    expected = log_probs(other.model, ex.input_ids.tolist())[-2]
    (word, value), *_ = ex.project(0, 2, k=1)
    assert value == pytest.approx(float(expected.max()), abs=1e-5)
    assert word == vlm.processor.tokenizer.decode([int(expected.argmax())])


def test_language_models_that_cannot_serve_end_a_run(built, folder, tmp_path):
    vlm = mf.VLM(*built("llava"))
    with pytest.raises(EndsRunError, match="the model cannot be loaded"):
        load_text_model(str(tmp_path / "gone"), vlm)
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path / "gpt")
    vlm.processor.tokenizer.save_pretrained(tmp_path / "gpt")
    with pytest.raises(EndsRunError, match="a text model is one of llama, mistral, qwen2, got 'gpt2'"):
        load_text_model(str(tmp_path / "gpt"), vlm)
