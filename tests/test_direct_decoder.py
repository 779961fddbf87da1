"""Decoder layers that are run directly: the same answers as by the model's own forward, and a way back to it."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref

import families
import numpy as np
import pytest
import tiny
import torch
import transformers
from mllm_fast.kernels.extension import cpu_extension
from packaging.version import Version
from PIL import Image
from torch import nn
from transformers import AttentionInterface

import mllm_fast as mf
from mllm_fast.runtime import direct_sequence
from mllm_fast.runtime.direct_decoder import direct_decoder, why_not_direct

pytestmark = [
    pytest.mark.skipif(cpu_extension()[0] is None, reason="the C++ extension is not built"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

QUESTION = "what color is the circle ?"
PICTURE = Image.fromarray(np.random.default_rng(7).integers(0, 256, (40, 90, 3), dtype=np.uint8))
COUNT = 10
DIRECT = ("qwen2_vl", "qwen3_vl", "molmo2")  # other types have layers of their own
NOT = ("internvl", "qwen3_vl_moe", "glm4v", "paligemma", "gemma3", "cohere2_vision", "lfm2_vl")


def build(name):
    model, processor = families.build(name) if name in families.BUILD else getattr(tiny, name)()
    return model.float().eval(), processor


@pytest.fixture
def passes(monkeypatch):
    """Counts the passes of sequences that are read directly."""
    seen = []
    read = direct_sequence.DirectSequence.read

    def counted(self, *given):
        seen.append(given)
        return read(self, *given)

    monkeypatch.setattr(direct_sequence.DirectSequence, "read", counted)
    return seen


def steps(vlm, knockouts=(), **options):
    """What a stream gives, with knockouts that are set before the given steps."""
    found = []
    options = {"explain": True, "max_new_tokens": COUNT, "min_new_tokens": COUNT} | options
    stream = vlm.stream(PICTURE, QUESTION, **options)
    changes = dict(knockouts)
    for index in itertools.count():
        if index in changes:
            stream.knockout = changes[index]
        step = next(stream, None)
        if step is None:  # a padding token ends it too
            return found
        shown = (step.head_scores, step.position_scores(), step.heatmap()) if options["explain"] else ()
        found.append((step.token_id, step.log_prob, *shown))


def assert_same(found, wanted):
    assert [one[0] for one in found] == [one[0] for one in wanted]
    for mine, right in zip(found, wanted, strict=True):
        assert mine[1] == pytest.approx(right[1], abs=2e-5)
        for one, other in zip(mine[2:], right[2:], strict=True):
            if one.shape == other.shape:
                # heads of equal scores may come in another order
                torch.testing.assert_close(one.sum(0), other.sum(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [*DIRECT, "llava", "qwen2_5_vl"])
def test_streams_as_the_model_itself(name, passes):
    model, processor = build(name)
    vlm, by_model = mf.VLM(model, processor), mf.VLM(model, processor, backend="torch")
    reason = why_not_direct(vlm.text)
    if reason and Version(transformers.__version__) < Version("5.24"):
        pytest.skip(f"older releases have other layers: {reason}")
    assert reason == ""
    closed = [(4, "image->generated"), (7, mf.Knockout("query", "generated", layers=[0])), (9, None)]
    for knockouts in ((), closed, [(0, "image->query")]):
        found = steps(vlm, knockouts)
        direct = len(passes)
        assert direct in (len(found) - 1, len(found))
        assert direct > 4
        assert_same(found, steps(by_model, knockouts))
        assert len(passes) == direct  # "torch" is a choice
        passes.clear()
    plain = steps(vlm, explain=False)
    generated = vlm.generate(PICTURE, QUESTION, max_new_tokens=COUNT, min_new_tokens=COUNT)
    assert [one[0] for one in plain] == generated.token_ids


@pytest.mark.parametrize("name", NOT)
def test_other_layers_are_run_by_the_model(name, passes):
    vlm = mf.VLM(*build(name))
    assert why_not_direct(vlm.text)
    assert steps(vlm, explain=False)
    assert not passes


@pytest.mark.parametrize("name", ["qwen2_vl", "llava"])
def test_contexts_answer_as_by_the_model(name):
    model, processor = build(name)
    found, wanted = [], []
    for vlm, into in ((mf.VLM(model, processor), found), (mf.VLM(model, processor, backend="torch"), wanted)):
        context = vlm.compress(PICTURE, keep=3, prompt="describe the image .", max_new_tokens=6)
        into.append(context.positions.tolist())
        asked = context.ask_many([QUESTION, "is there a square ?"], max_new_tokens=8, min_new_tokens=8)
        into.append([answer.token_ids for answer in asked])
        into.append([step.token_id for step in context.stream(QUESTION, max_new_tokens=8, min_new_tokens=8)])
        chat = context.chat()
        into.append([chat.ask(text, max_new_tokens=4).token_ids for text in (QUESTION, "is it red ?")])
        into.append(context.explain(QUESTION, max_new_tokens=4, min_new_tokens=4).head_scores)
    assert found[:-1] == wanted[:-1]
    torch.testing.assert_close(found[-1], wanted[-1], rtol=1e-3, atol=1e-4)


def test_a_hook_is_called_and_the_stream_goes_on(shapes, picture, passes):
    wanted = [step.token_id for step in shapes.stream(picture, "Describe the image.", max_new_tokens=12)]
    direct = len(passes)
    assert direct > 8
    seen = []
    stream = shapes.stream(picture, "Describe the image.", max_new_tokens=12)
    found = [next(stream).token_id for _ in range(4)]
    handle = shapes.text.layers[2].mlp.register_forward_hook(lambda *_: seen.append(1))
    try:
        found += [next(stream).token_id for _ in range(3)]
    finally:
        handle.remove()
    assert len(seen) == 3
    found += [step.token_id for step in stream]
    assert found == wanted
    assert direct_decoder(shapes.text) is not None  # the hook is gone


@pytest.mark.parametrize("path", ["", "model", "model.language_model", "lm_head", "model.language_model.rotary_emb"])
def test_hooks_on_whatever_holds_the_layers_are_called(path, passes):
    """Of the whole model, of the decoder and of the unembedding as well."""
    model, processor = build("llava")
    vlm, seen = mf.VLM(model, processor), []
    wanted = [one[0] for one in steps(vlm, explain=False)]
    handle = model.get_submodule(path).register_forward_hook(lambda *_: seen.append(1))
    try:
        assert [one[0] for one in steps(vlm, explain=False)] == wanted
    finally:
        handle.remove()
    assert len(seen) >= len(wanted)


def test_replaced_and_dropped_layers_are_seen(passes):
    model, processor = build("llava")
    vlm = mf.VLM(model, processor)
    decoder, steps_before = vlm.text.decoder, steps(vlm, explain=False)
    assert direct_decoder(vlm.text).usable
    other = copy.deepcopy(decoder.layers[1])
    with torch.no_grad():
        other.mlp.down_proj.weight.mul_(3)
    kept, decoder.layers[1] = decoder.layers[1], other
    assert direct_decoder(vlm.text) is None
    assert steps(vlm, explain=False) != steps_before
    decoder.layers[1] = kept
    assert direct_decoder(vlm.text) is not None
    whole, decoder.layers = decoder.layers, decoder.layers[:-1]
    assert direct_decoder(vlm.text) is None
    decoder.layers = whole
    del decoder.layers[0].mlp.act_fn
    assert direct_decoder(vlm.text) is None


def test_a_model_that_nobody_holds_is_freed():
    """What is remembered of a model, and of its tokenizer, does not keep them in memory."""
    model, processor = build("llava")
    vlm = mf.VLM(model, processor)
    for step in vlm.stream(PICTURE, QUESTION, explain=True, max_new_tokens=4):
        step.heatmap()
    vlm.compress(PICTURE, keep=3, prompt="describe the image .", max_new_tokens=4).ask(QUESTION, max_new_tokens=2)
    assert direct_decoder(vlm.text) is not None
    held = weakref.ref(model), weakref.ref(processor.tokenizer)
    del model, processor, vlm, step
    gc.collect()
    assert [one() for one in held] == [None, None]


def test_another_result_than_the_models_own_is_told(monkeypatch, passes):
    """It would be a fault of this library: the model's own forward runs, and a warning says so."""
    model, processor = build("llava")
    vlm = mf.VLM(model, processor)
    wanted = [one[0] for one in steps(vlm, explain=False)]
    passes.clear()
    monkeypatch.setattr(direct_sequence, "allowed", lambda dtype: 0.0)
    with pytest.warns(UserWarning, match="other logits than the model itself"):
        assert [one[0] for one in steps(vlm, explain=False)] == wanted
    assert len(passes) == 1


def test_changed_weights_are_read(passes):
    model, processor = build("llava")
    vlm, by_model = mf.VLM(model, processor), mf.VLM(model, processor, backend="torch")
    before = steps(vlm, explain=False)
    with torch.no_grad():
        vlm.text.layers[0].mlp.down_proj.weight.mul_(3)  # in place
    in_place = steps(vlm, explain=False)
    assert_same(in_place, steps(by_model, explain=False))
    assert [one[1] for one in in_place] != [one[1] for one in before]
    vlm.text.layers[1].self_attn.o_proj.weight.data = torch.randn_like(vlm.text.layers[1].self_attn.o_proj.weight) / 8
    passes.clear()
    assert_same(steps(vlm, explain=False), steps(by_model, explain=False))  # in other memory
    assert len(passes) == COUNT - 1


def test_an_adapter_is_run_by_the_model(passes):
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) + 0.1 * x.flip(-1)[..., : self.base.out_features]

    model, processor = build("llava")
    vlm = mf.VLM(model, processor)
    steps(vlm, explain=False)
    passes.clear()
    layer = vlm.text.layers[0].self_attn
    layer.v_proj = Adapter(layer.v_proj)
    found = steps(vlm, explain=False)
    assert not passes
    assert "v_proj is no plain linear layer" in why_not_direct(vlm.text)
    layer.v_proj = layer.v_proj.base
    assert why_not_direct(vlm.text) == ""
    assert [one[1] for one in steps(vlm, explain=False)] != [one[1] for one in found]
    assert passes


def test_a_registered_attention_is_the_users(passes):
    model, processor = build("llava")
    vlm, calls = mf.VLM(model, processor), []
    sdpa = AttentionInterface._global_mapping["sdpa"]

    def mine(*args, **kwargs):
        calls.append(1)
        return sdpa(*args, **kwargs)

    AttentionInterface.register("mine", mine)
    before = vlm.text.config._attn_implementation
    try:
        model.set_attn_implementation({"text_config": "mine"})
        assert vlm.text.config._attn_implementation == "mine"
        steps(vlm, explain=False)
    finally:
        vlm.text.config._attn_implementation = before
        AttentionInterface._global_mapping.pop("mine")
    assert len(calls) == COUNT * len(vlm.text.layers)


def test_a_block_of_knockouts_is_heard(passes):
    """Inside it the model's own forward runs, and it is not taken for the last word about the model."""
    model, processor = build("llava")
    vlm, closed = mf.VLM(model, processor), mf.Knockout("image", "query+generated")
    wanted = [step.token_id for step in vlm.stream(PICTURE, QUESTION, knockout=closed, max_new_tokens=COUNT)]
    fresh = mf.VLM(model, processor)
    passes.clear()
    for one in (fresh, vlm):
        with one.knocked_out(closed):
            found = [step.token_id for step in one.stream(PICTURE, QUESTION, max_new_tokens=COUNT)]
        assert found == wanted
    assert not passes
    steps(fresh, explain=False)
    assert passes


def test_training_and_autocast_are_the_models(passes):
    model, processor = build("llava")
    vlm = mf.VLM(model, processor)
    decoder = direct_decoder(vlm.text)
    assert decoder is not None
    with torch.autocast("cpu"):
        assert not decoder.usable
    vlm.text.decoder.train()
    assert not decoder.usable
    vlm.text.decoder.eval()
    assert decoder.usable


def test_a_layer_with_something_beside_its_parts_is_seen():
    model, processor = build("llava")
    vlm = mf.VLM(model, processor)
    layer = vlm.text.layers[1]
    forward = type(layer).forward

    class Louder(type(layer)):
        def forward(self, *args, **kwargs):
            return forward(self, *args, **kwargs) * 1.001

    layer.__class__ = Louder
    assert "compute something beside their parts" in why_not_direct(vlm.text)
