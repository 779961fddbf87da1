"""Autocast and models of several types: attention casts as torch's own does, and scores are computed as they are."""

from __future__ import annotations

import contextlib

import pytest
import torch

import mllm_fast as mf
from mllm_fast.core.assets import SAMPLE
from mllm_fast.explain.registry import methods_without_detector
from mllm_fast.runtime import hooks

ASKED, LONG = "What color is the star?", "Describe the image."
KINDS = [torch.bfloat16, torch.float16]
# what one rounding is of a number
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def cast(kind: torch.dtype):
    return torch.autocast("cpu", kind)


def loaded(part: str) -> mf.VLM:
    """The embedded model in bfloat16, with some parts in float32, as quantising and training leave them."""
    vlm = mf.VLM.from_pretrained("shapes", dtype="bfloat16")
    for name, module in vlm.model.named_modules():
        if part in name:
            module.float()
    return vlm


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_torch_s_own_under_autocast(shapes, kind):
    """The logits of the recorded model against those of the model as it is."""
    inputs, _ = shapes.prepare(SAMPLE, LONG)
    with torch.inference_mode(), cast(kind):
        own = shapes.model(**inputs).logits.float()
        with hooks.recording(shapes.text, 1) as record:
            ours = shapes.model(**inputs).logits.float()
    assert record.query[0][0].dtype == kind
    # one rounding more or less in each of the layers' outputs
    tolerance = 4 * ROUNDING[kind] * own.abs().max()
    torch.testing.assert_close(ours, own, rtol=0, atol=float(tolerance))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True])
def test_explanations_under_autocast_are_those_of_float32_but_for_rounding(shapes, kind, stream):
    plain = shapes.explain(SAMPLE, LONG, max_new_tokens=8)
    with cast(kind):
        if stream:
            with shapes.stream(SAMPLE, LONG, explain=True, max_new_tokens=8) as steps:
                found = [step.explanation for step in steps]
            heads = torch.cat([one.head_scores for one in found])
            maps = torch.stack([one.heatmap(0) for one in found])
        else:
            ex = shapes.explain(SAMPLE, LONG, max_new_tokens=8)
            heads, maps = ex.head_scores, torch.stack([ex.heatmap(i) for i in range(8)])
    assert heads.dtype == torch.float32
    for got, wanted in (
        (heads, plain.head_scores),
        (maps, torch.stack([plain.heatmap(i) for i in range(8)])),
    ):
        assert float((got - wanted).norm() / wanted.norm()) < 4 * ROUNDING[kind]


@pytest.mark.parametrize("method", methods_without_detector())
def test_scores_are_the_same_inside_and_outside(shapes, method):
    """What is computed from the recording is not cast; what runs the model again is but for its rounding."""
    with cast(torch.bfloat16):
        ex = shapes.explain(SAMPLE, ASKED, max_new_tokens=2)
        inside = ex.heatmap(0, method)
        numbers = ex.head_scores, ex.position_scores(0), ex.attention(0), ex.project(0, 3, k=4)
    ex.forget()
    outside = ex.heatmap(0, method)
    if method != "exhaustive":  # the differences of probabilities near 1 are smaller than a rounding of bfloat16
        torch.testing.assert_close(inside, outside, rtol=0.05, atol=0.02 * float(outside.abs().max()))
    others = ex.head_scores, ex.position_scores(0), ex.attention(0), ex.project(0, 3, k=4)
    for one, other in zip(numbers[:3], others[:3], strict=True):
        assert torch.equal(one, other)
    assert numbers[3] == others[3]


@pytest.mark.parametrize("kind", KINDS)
def test_knockouts_and_shares(shapes, kind):
    rule = mf.Knockout("image", "query+generated")
    plain = shapes.generate(SAMPLE, LONG, knockout=rule, attention_share=True, max_new_tokens=6)
    with cast(kind):
        found = shapes.generate(SAMPLE, LONG, knockout=rule, attention_share=True, max_new_tokens=6)
        with shapes.knocked_out(rule):
            inputs, _ = shapes.prepare(SAMPLE, LONG)
            own = shapes.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert found.token_ids == plain.token_ids == own[0, inputs["input_ids"].shape[1] :].tolist()
    for name, share in plain.attention_share.items():
        torch.testing.assert_close(found.attention_share[name], share, rtol=0, atol=8 * ROUNDING[kind])


@pytest.mark.parametrize("made", [None, *KINDS])
@pytest.mark.parametrize("asked", [None, *KINDS])
def test_contexts_go_in_and_out_of_autocast(shapes, made, asked):
    wanted = shapes.compress(SAMPLE, keep=0.3).ask_many([ASKED, LONG], max_new_tokens=8)
    with contextlib.nullcontext() if made is None else cast(made):
        ctx = shapes.compress(SAMPLE, keep=0.3)
    with contextlib.nullcontext() if asked is None else cast(asked):
        found = ctx.ask_many([ASKED, LONG], max_new_tokens=8)
        assert ctx.chat().ask(ASKED).text == wanted[0].text
        assert ctx.explain(ASKED).heatmap(0).isfinite().all()
    assert [one.text for one in found] == [one.text for one in wanted]


@pytest.mark.parametrize("part", ["vision_tower", "multi_modal_projector", "q_proj"])
def test_models_of_several_types_under_autocast(shapes, part):
    """They run under autocast alone, and everything else does so, too."""
    vlm = loaded(part)
    with cast(torch.bfloat16):
        ex = vlm.explain(SAMPLE, ASKED)
        assert ex.text == vlm.generate(SAMPLE, ASKED).text == shapes.generate(SAMPLE, ASKED).text
        for method in methods_without_detector():
            assert ex.heatmap(0, method).isfinite().all()
        assert ex.verify(tokens=[0])
        assert vlm.compress(SAMPLE, keep=0.3).ask(ASKED).text == ex.text
    plain = shapes.explain(SAMPLE, ASKED)
    error = (ex.head_scores - plain.head_scores).norm() / plain.head_scores.norm()
    assert float(error) < 4 * ROUNDING[torch.bfloat16]


def test_a_model_that_is_loaded_under_autocast(shapes):
    vlm = loaded("norm")
    with cast(torch.bfloat16):
        found = mf.VLM(vlm.model, vlm.processor).explain(SAMPLE, ASKED)
    assert found.text == shapes.generate(SAMPLE, ASKED).text
