"""Passes over prompts that are run directly: what the model's own forward gives, and that forward for all else."""

from __future__ import annotations

import families
import numpy as np
import pytest
import tiny
import torch
from mllm_fast.kernels.extension import cpu_extension
from PIL import Image
from transformers import DynamicCache
from transformers.masking_utils import causal_mask_function

import mllm_fast as mf
from mllm_fast.runtime import direct_passes
from mllm_fast.runtime.direct_decoder import DirectDecoder, direct_decoder
from mllm_fast.runtime.direct_passes import passes
from mllm_fast.runtime.kv_cache import CACHE
from mllm_fast.runtime.row_mask import RowMask

pytestmark = pytest.mark.skipif(cpu_extension()[0] is None, reason="the C++ extension is not built")

QUESTION = "what color is the circle ?"
WIDTH = 48  # of the tiny LLaVA
PICTURE = Image.fromarray(np.random.default_rng(7).integers(0, 256, (40, 90, 3), dtype=np.uint8))
KNOCKOUTS = (None, "image->generated", mf.Knockout("image", "query", layers=[1]))


def build(name):
    model, processor = families.build(name) if name in families.BUILD else getattr(tiny, name)()
    return model.float().eval(), processor


@pytest.fixture(scope="module")
def llava():
    model, processor = build("llava")
    return mf.VLM(model, processor), mf.VLM(model, processor, backend="torch")


@pytest.fixture
def rows(monkeypatch):
    """How many rows each pass has that is run directly."""
    seen = []
    run = DirectDecoder.__call__

    def counted(self, hidden, *rest):
        seen.append(len(hidden))
        return run(self, hidden, *rest)

    monkeypatch.setattr(DirectDecoder, "__call__", counted)
    return seen


def length_of(vlm):
    inputs, _ = vlm.prepare(PICTURE, QUESTION)
    return inputs["input_ids"].shape[1]


def interrupted(text):
    with passes(text, 1):
        assert "forward" in vars(text.decoder)
        raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen2_5_vl"])
def test_explanations_as_by_the_model(name, rows):
    model, processor = build(name)
    vlm, by_model = mf.VLM(model, processor), mf.VLM(model, processor, backend="torch")
    length = length_of(vlm)
    for knockout in KNOCKOUTS:
        for answer in (None, "a red circle"):
            rows.clear()
            options = {} if answer else {"max_new_tokens": 4, "min_new_tokens": 4}
            found = vlm.explain(PICTURE, QUESTION, answer, knockout=knockout, **options)
            count = len(found.token_ids)
            assert rows[-1 if answer else -4 :] == ([length + count - 1] if answer else [length, 1, 1, 1])
            wanted = by_model.explain(PICTURE, QUESTION, answer, knockout=knockout, **options)
            assert found.token_ids == wanted.token_ids
            torch.testing.assert_close(found.head_scores, wanted.head_scores, rtol=1e-3, atol=2e-5)
            for token in range(count):
                mine, right = (one.position_scores(token, [(0, 1), (1, 0)]) for one in (found, wanted))
                torch.testing.assert_close(mine, right, rtol=1e-3, atol=2e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_contexts_and_shares_as_by_the_model(llava, rows):
    length = length_of(llava[0])
    for keep in (1.0, 5):
        found, wanted = (
            one.compress(PICTURE, keep=keep, prompt="describe the image .", max_new_tokens=6) for one in llava
        )
        assert max(rows) > 20
        assert found.positions.tolist() == wanted.positions.tolist()
        for mine, right in zip(found.keys, wanted.keys, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)
        assert found.ask(QUESTION).token_ids == wanted.ask(QUESTION).token_ids
    rows.clear()
    options = {"knockout": "image->query", "attention_share": True, "max_new_tokens": 5, "min_new_tokens": 5}
    found, wanted = (one.generate(PICTURE, QUESTION, **options) for one in llava)
    assert rows == [length]  # the others are observed
    for name, share in wanted.attention_share.items():
        torch.testing.assert_close(found.attention_share[name], share, rtol=1e-4, atol=1e-5)


def test_only_rows_that_are_read_have_numbers(llava):
    vlm, _ = llava
    length = length_of(vlm)
    ends = []
    for read in (None, 1, 3):
        with passes(vlm.text, read=read), torch.inference_mode():
            found = vlm.text.decoder(inputs_embeds=torch.ones(1, length, WIDTH) / 9, use_cache=False).last_hidden_state[
                0
            ]
        count = length if read is None else read
        assert found[length - count :].isfinite().all()
        assert found[: length - count].isnan().all()
        ends.append(found[-1])
    torch.testing.assert_close(ends[1:], ends[:1] * 2, rtol=1e-5, atol=1e-6)


def test_a_cache_is_gone_on_with(llava, rows):
    """Token by token, behind a cut, and in a copy: always what one pass over the same tokens gives."""
    vlm, _ = llava
    draw = torch.Generator().manual_seed(3)
    embeds = torch.randn(1, 90, WIDTH, generator=draw) / 9
    run = vlm.text.decoder
    with torch.inference_mode(), passes(vlm.text):
        whole = run(inputs_embeds=embeds, use_cache=True)
        cache, found = DynamicCache(config=vlm.text.config), []
        for start, stop in ((0, 20), (20, 21), (21, 90)):
            found.append(run(inputs_embeds=embeds[:, start:stop], **{CACHE: cache}).last_hidden_state)
        torch.testing.assert_close(torch.cat(found, 1), whole.last_hidden_state, rtol=1e-4, atol=1e-5)
        held = [layer.keys for layer in cache.layers]
        before = [one.clone() for one in held]
        cache.crop(-40)
        other = run(inputs_embeds=embeds[:, :40], **{CACHE: cache}).last_hidden_state
        assert all(torch.equal(one, two) for one, two in zip(held, before, strict=True))  # whoever kept them has them
        again = run(inputs_embeds=torch.cat([embeds[:, :50], embeds[:, :40]], 1), use_cache=True).last_hidden_state
        torch.testing.assert_close(other, again[:, 50:], rtol=1e-4, atol=1e-5)
    assert rows == [90, 20, 1, 69, 40, 90]


def test_any_other_pass_is_the_models_own(rows, monkeypatch):
    text = mf.VLM(*build("llava")).text
    embeds = torch.ones(1, 12, WIDTH) / 9
    direct_decoder(text)
    rows.clear()
    padding = torch.tensor([[False] * 3 + [True] * 9])
    rule = RowMask.of(causal_mask_function, padding, 12, 12, 0, 0, embeds.device)
    others = {
        "a batch": {"inputs_embeds": embeds.expand(2, -1, -1)},
        "padding": {"inputs_embeds": embeds, "attention_mask": torch.tensor([[0] * 3 + [1] * 9])},
        "hidden states": {"inputs_embeds": embeds, "output_hidden_states": True},
        "a mask of the caller's": {"inputs_embeds": embeds, "attention_mask": torch.zeros(1, 1, 12, 12)},
        "a rule with padding": {"inputs_embeds": embeds, "attention_mask": rule},
        "float64": {"inputs_embeds": embeds.double()},
    }
    for what, given in others.items():
        with passes(text), torch.inference_mode():
            try:
                text.decoder(**given, use_cache=False)
            except RuntimeError:
                assert what == "float64"  # which the model does not take
        assert not rows, what
    with passes(text), torch.inference_mode():  # the hooks that transformers left behind for hidden states do nothing
        text.decoder(inputs_embeds=embeds, use_cache=False)
    assert rows == [12]
    rows.clear()
    with passes(text):  # gradients
        assert text.decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state.requires_grad
    monkeypatch.setattr(direct_passes, "_MOST", 11)
    with passes(text), torch.inference_mode():
        text.decoder(inputs_embeds=embeds, use_cache=False)
    assert not rows
    hook = text.layers[0].register_forward_hook(lambda *_: None)
    try:
        with passes(text, 1), torch.inference_mode():
            text.decoder(inputs_embeds=embeds[:, :5], use_cache=False)
        assert not rows
    finally:
        hook.remove()


def test_the_decoder_is_restored(llava):
    vlm, _ = llava
    text = vlm.text
    with pytest.raises(KeyboardInterrupt):
        interrupted(text)
    assert "forward" not in vars(text.decoder)
    assert not str(text.config._attn_implementation).startswith("mllm_fast")
    text.decoder.forward = text.decoder.forward  # a user's own, which stays and is called
    try:
        with passes(text, 1):
            pass
        assert "forward" in vars(text.decoder)
    finally:
        del text.decoder.forward


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_logits_are_of_the_rows_that_are_asked_for(llava, rows, kept):
    vlm, by_model = llava
    inputs, _ = vlm.prepare(PICTURE, QUESTION)
    with torch.inference_mode():
        wanted = by_model.model(**inputs, logits_to_keep=kept).logits
        with passes(vlm.text, read=vlm.model):
            found = vlm.model(**inputs, logits_to_keep=kept).logits
    assert rows == [inputs["input_ids"].shape[1]]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not vlm.model._forward_pre_hooks
