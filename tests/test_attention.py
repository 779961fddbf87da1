"""Equivalence 1: inside the seam a model computes what its own eager attention computes, and after it the
model is as before. All in float64, so that the tolerance (1e-9 on logits of order 1 to 10) is rounding alone."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from mllm_fast.core.errors import InputError
from mllm_fast.runtime.attention import Scoring, attend
from mllm_fast.runtime.hooks import recording
from mllm_fast.runtime.row_mask import RowMask, row_mask

QUESTION = "what color is the circle ?"


def logits(vlm, inputs, **options):
    with torch.no_grad():
        return vlm.model(**inputs, **options).logits


def eager(vlm, inputs, **options):
    with tiny.eager(vlm.model):
        return logits(vlm, inputs, **options)


def test_prefill_equals_eager(vlm, picture):
    inputs, _ = vlm.prepare(picture, QUESTION)
    with recording(vlm.text, rows=1):
        inside = logits(vlm, inputs)
    torch.testing.assert_close(inside, eager(vlm, inputs), rtol=0, atol=1e-9)


def test_cached_decoding_equals_eager(vlm, picture):
    inputs, _ = vlm.prepare(picture, QUESTION)

    def decode():
        return vlm.model.generate(
            **inputs, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
        )

    with recording(vlm.text, rows=1):
        inside = decode()
    with tiny.eager(vlm.model):
        outside = decode()
    assert torch.equal(inside.sequences, outside.sequences)
    for a, b in zip(inside.logits, outside.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_left_padding_equals_eager(vlm, picture):
    """Two prompts of different lengths in one batch: the rows that are no padding agree."""
    texts = [vlm.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": t}]}], add_generation_prompt=True
    ) for t in (QUESTION, "describe this")]  # fmt: skip
    inputs = vlm.processor(images=[[picture], [picture]], text=texts, return_tensors="pt", padding=True)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    real = inputs["attention_mask"].bool()
    assert not real.all(), "the batch must be padded"
    with recording(vlm.text, rows=1) as record:
        inside = logits(vlm, inputs)
    torch.testing.assert_close(inside[real], eager(vlm, inputs)[real], rtol=0, atol=1e-9)
    assert record.seen[0][0].shape[-1] == real.shape[1]
    assert not inside.isnan().any()


@pytest.mark.parametrize("leave", ["normally", "by exception"])
def test_everything_is_restored(vlm, picture, leave):
    inputs, _ = vlm.prepare(picture, QUESTION)
    before = logits(vlm, inputs)
    names = set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)
    implementation = vlm.text.config._attn_implementation
    try:
        with recording(vlm.text, rows=1):
            assert vlm.text.config._attn_implementation != implementation
            assert vlm.model.config.vision_config._attn_implementation == implementation
            logits(vlm, inputs)
            if leave == "by exception":
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert vlm.text.config._attn_implementation == implementation
    assert (set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)) == names
    assert not any(m._forward_pre_hooks for m in vlm.model.modules())
    assert torch.equal(before, logits(vlm, inputs))


def test_gradients_flow_outside(vlm, picture):
    inputs, _ = vlm.prepare(picture, QUESTION)
    with recording(vlm.text, rows=1):
        logits(vlm, inputs)
    loss = vlm.model(**inputs).logits.square().mean()
    (gradient,) = torch.autograd.grad(loss, [vlm.text.outputs[0].weight])
    assert gradient.abs().sum() > 0


def test_sliding_window_is_honoured():
    """A rule of transformers other than plain causal attention goes through as a rule."""
    part = tiny.sliding(5)
    text = part.decoder
    ids = torch.randint(4, 20, (1, 23), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with tiny.eager(text):
            outside = text(input_ids=ids, use_cache=False).last_hidden_state
            text.config.sliding_window = 500
            unlimited = text(input_ids=ids, use_cache=False).last_hidden_state
        text.config.sliding_window = 5
        with recording(part, rows=1):
            inside = text(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(inside, outside, rtol=0, atol=1e-9)
    assert (outside - unlimited).abs().max() > 1e-3, "the window must matter here"


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_kernel_asked_for_by_name_is_not_replaced(backend):
    part = tiny.sliding(5)
    ids = torch.randint(4, 20, (1, 23), generator=torch.Generator().manual_seed(1))
    with pytest.raises(InputError, match=f"backend='{backend}' serves causal"), recording(part, 0, backend=backend):
        part.decoder(input_ids=ids, use_cache=False)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("rows", "keys"), [(7, 7), (1, 9), (3, 9), (300, 300), (290, 301)])
def test_attend_equals_the_formula(rows, keys, padded):
    """Grouped heads, few and many rows, with and without padding, against softmax(q k^T) v written out."""
    gen = torch.Generator().manual_seed(rows)
    query = torch.randn(2, 6, rows, 8, generator=gen, dtype=torch.float64)
    key, value = (torch.randn(2, 2, keys, 8, generator=gen, dtype=torch.float64) for _ in range(2))
    attention_mask = torch.ones(2, keys, dtype=torch.long)
    if padded:
        attention_mask[0, :2] = 0
    mask = row_mask(2, rows, keys, q_offset=keys - rows, attention_mask=attention_mask)
    assert mask.causal != padded
    seen = torch.arange(keys)[None, :] <= torch.arange(keys - rows, keys)[:, None]
    seen = seen[None, None] & attention_mask.bool()[:, None, None, :]
    scores = query @ key.repeat_interleave(3, 1).mT * 0.3
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1).nan_to_num(0)
    expected = weights @ value.repeat_interleave(3, 1)
    torch.testing.assert_close(attend(query, key, value, mask, Scoring(0.3)).output, expected, rtol=0, atol=1e-12)


def test_static_cache_end_is_left_out():
    mask = row_mask(1, 1, 12, q_offset=6, attention_mask=torch.ones(1, 7, dtype=torch.long))
    assert isinstance(mask, RowMask)
    assert mask.shape == (1, 1, 1, 7)
    assert mask.block(0, 1).all()


def test_unknown_attention_is_refused(built, picture):
    import mllm_fast as mf

    vlm = mf.VLM(*built("llava"))
    attention = vlm.text.layers[0].self_attn
    with recording(vlm.text, rows=1):
        function = AttentionInterface._global_mapping[vlm.text.config._attn_implementation]
        q = torch.zeros(1, 3, 2, 16)
        with pytest.raises(NotImplementedError, match="position_bias"):
            function(attention, q, q, q, None, position_bias=q)
        with pytest.raises(RuntimeError, match="no mask"):
            function(attention, q, q, q, None)
        with pytest.raises(NotImplementedError, match="dropout"):
            function(attention, q, q, q, None, dropout=0.1)


def test_a_rule_that_is_no_function_of_indices_is_an_array():
    blocks = torch.tensor([[0, 1, 1, 2]])

    def rule(batch, head, row, key):
        return (key <= row) | (blocks[batch, row] == blocks[batch, key])

    mask = row_mask(1, 4, 4, mask_function=rule, use_vmap=True)
    assert not isinstance(mask, RowMask)
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_other_code_finds_an_array_in_a_mask():
    """A model may look at the mask, cut it or add to it; it is a tensor that takes no memory until then."""
    mask = row_mask(2, 3, 5, q_offset=2, attention_mask=torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]))
    whole = mask.block(0, 3)
    assert isinstance(mask, torch.Tensor)
    assert (mask.shape, mask.ndim) == ((2, 1, 3, 5), 4)
    assert mask.stride() == (0, 0, 0, 0)
    assert torch.equal(mask[:, :, -1:], whole[:, :, -1:])
    assert torch.equal(~mask, ~whole)
    assert torch.equal(torch.where(mask, 0.0, -1.0), torch.where(whole, 0.0, -1.0))
    assert mask.to("cpu", non_blocking=True) is mask
    assert isinstance(mask.to("meta"), RowMask)
    assert torch.equal(mask.to(torch.float32), whole.float())
    assert torch.equal(mask.contiguous(), whole)


def test_recording_takes_the_last_rows(built, picture):
    import mllm_fast as mf

    vlm = mf.VLM(*built("llava"))
    inputs, _ = vlm.prepare(picture, QUESTION)
    with torch.no_grad():
        hidden = vlm.model(**inputs, output_hidden_states=True).hidden_states
        with recording(vlm.text, rows=3) as record:
            vlm.model(**inputs, use_cache=True)
    for layer in range(3):
        torch.testing.assert_close(record.residual[layer][0], hidden[layer][:, -3:], rtol=0, atol=1e-9)
        assert record.query[layer][0].shape == (1, 3, 3, 16)
