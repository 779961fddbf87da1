"""The whole of a model on a GPU, on the Triton kernels where they serve (heads from 16): it says what the same model
says in float64 on the CPU, and errs by no more than plain torch does on that GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from mllm_fast.kernels.dispatch import choose

import mllm_fast as mf

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
DEVICE, KERNELS = "cuda", "auto"
QUESTION = "what color is the circle ?"
WORDS = 5
RULES = {
    "whole": None,
    "knocked out": [mf.Knockout("image", "query+generated", "from 1"), mf.Knockout("system", "generated")],
}


@pytest.fixture(scope="module")
def ways(built):
    """Family -> the model in float64 on the CPU; in float32 on the GPU, in plain torch and on the kernels."""
    cache = {}

    def make(family):
        if family not in cache:
            model, processor = built(family)
            moved = copy.deepcopy(model).float().to(DEVICE)
            on_gpu = [mf.VLM(moved, processor, backend=backend) for backend in ("torch", KERNELS)]
            cache[family] = (mf.VLM(model, processor, backend="torch"), *on_gpu)
        return cache[family]

    return make


def assert_close(got, low, truth):
    """By twice what plain torch errs, and 32 roundings of the largest number: three products of tf32 give 21 bits."""
    truth, largest = truth.double(), float(truth.abs().max())
    allowed = 2 * float((low.double() - truth).abs().max()) + 32 * torch.finfo(torch.float32).eps * max(largest, 1)
    worst = float((got.double() - truth).abs().max())
    assert worst <= allowed, f"error {worst:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_explanations(ways, family, picture, rules):
    found = [vlm.explain(picture, QUESTION, knockout=rules, max_new_tokens=WORDS) for vlm in ways(family)]
    truth, low, got = found
    assert got.token_ids == low.token_ids == truth.token_ids
    assert_close(got.head_scores, low.head_scores, truth.head_scores)
    for token in range(len(truth.tokens)):
        heads = [(layer, head) for layer, head, _ in truth.top_heads(token, 3)]
        for read in (lambda ex: ex.position_scores(token, heads), lambda ex: ex.attention(token)):  # noqa: B023
            assert_close(*(read(ex) for ex in (got, low, truth)))
    changes = [torch.tensor([(v.log_prob, v.top, v.lowest) for v in ex.verify(0.2, 2)]) for ex in (got, low, truth)]
    assert_close(*changes)


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_streams_and_shares(ways, family, picture, rules):
    _, _, vlm = found = ways(family)
    options = {"knockout": rules, "attention_share": True, "max_new_tokens": WORDS}
    said, low, got = (each.generate(picture, QUESTION, **options) for each in found)
    assert got.token_ids == said.token_ids
    for kind, share in said.attention_share.items():
        assert_close(got.attention_share[kind].cpu(), low.attention_share[kind].cpu(), share)
    ex = vlm.explain(picture, QUESTION, knockout=rules, max_new_tokens=WORDS)
    steps = list(vlm.stream(picture, QUESTION, explain=True, knockout=rules, max_new_tokens=WORDS))
    assert [step.token_id for step in steps] == said.token_ids
    for i, step in enumerate(steps):
        torch.testing.assert_close(step.head_scores, ex.head_scores[i], rtol=1e-3, atol=1e-4)
    again = list(vlm.stream(picture, QUESTION, explain=True, knockout=rules, max_new_tokens=WORDS, static=True))
    assert [step.token_id for step in again] == said.token_ids  # replayed from a graph
    for mine, step in zip(again, steps, strict=True):
        torch.testing.assert_close(mine.head_scores, step.head_scores, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(mine.heatmap(), step.heatmap(), rtol=1e-3, atol=1e-4)
    batch = vlm.generate(
        [picture, picture], [QUESTION, "describe this picture ."], knockout=rules, max_new_tokens=WORDS
    )
    assert batch[0].token_ids == said.token_ids


def test_contexts(ways, family, picture, tmp_path):
    truth, _, vlm = ways(family)
    questions = [QUESTION, "describe this picture .", "is the circle red ?"]
    contexts = [each.compress(picture, keep=0.4, max_new_tokens=WORDS) for each in (truth, vlm)]
    for layer in range(len(vlm.text.layers)):
        expected, kept = (context.kept(layer).positions for context in contexts)
        assert torch.as_tensor(kept).tolist() == torch.as_tensor(expected).tolist()
    expected = [answer.token_ids for answer in contexts[0].ask_many(questions, max_new_tokens=WORDS)]
    contexts[1].save(tmp_path / "context.safetensors")
    loaded = mf.Context.load(tmp_path / "context.safetensors", vlm, images=[picture])
    for context in (contexts[1], loaded):
        assert [answer.token_ids for answer in context.ask_many(questions, max_new_tokens=WORDS)] == expected
        assert context.explain(QUESTION, max_new_tokens=WORDS).token_ids == expected[0]


def test_the_embedded_model_as_it_is_loaded(shapes, picture):
    """bfloat16 on the GPU by default, "auto" the Triton kernels; the tensors stay there."""
    vlm = mf.VLM.from_pretrained("shapes")
    assert (vlm.model.device.type, vlm.model.dtype) == (DEVICE, torch.bfloat16)
    ops = ("knockout_attention", "logprob_increase", "topk_compaction", "weighted_values")
    assert {choose(vlm.model.device, vlm.model.dtype, op=op) for op in ops} == {"triton"}
    said = shapes.explain(picture, "Describe the image.")
    ex = vlm.explain(picture, "Describe the image.", answer=said.token_ids)
    heads = said.head_scores.flatten(1).argmax(1)
    assert (ex.head_scores.flatten(1).argmax(1) == heads).float().mean() > 0.7  # of a model in bfloat16
    assert ex.heatmap(0).shape == said.heatmap(0).shape
    assert vlm.compress(picture, keep=0.2).ask("Is there a circle?").text in ("yes", "no")
