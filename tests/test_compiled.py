"""Models under torch.compile(fullgraph=True), and static caches: knockouts and recordings are those of the model as it
is written, and nothing is compiled again from token to token or from block to block."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import tiny
import torch
from families import BUILD
from PIL import Image
from transformers import StaticCache

import mllm_fast as mf
from mllm_fast.runtime.kv_cache import CACHE, cache_of

# transformers compiles these whole: causal, a sliding window, and a rule of its own
CASES = [("llava", "dynamic"), ("llava", "static"), ("gemma3", "static"), ("paligemma", "static")]
TOKENS = 8
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
RULE = "image->query"


class Graphs:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, example):
        self.count += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_of(name: str) -> mf.VLM:
    model, processor = (tiny.BUILD[name] if name in tiny.BUILD else BUILD[name])()[:2]
    return mf.VLM(model.double(), processor)


def loop(vlm, run, cache=None, graphs=None):
    """Logits of a decoding loop, the sequence, and how many graphs there were after the fourth token."""
    inputs, _ = vlm.prepare(PICTURE, "what is this")
    given = {} if cache is None else {CACHE: cache}
    early = 0
    with torch.no_grad():
        out = run(**inputs, **given, use_cache=True)
        logits, ids = [out.logits[:, -1]], inputs["input_ids"]
        for step in range(TOKENS):
            token = logits[-1].argmax(-1)[:, None]
            ids = torch.cat([ids, token], 1)
            out = run(input_ids=token, use_cache=True, **{CACHE: cache_of(out)})
            logits.append(out.logits[:, -1])
            early = graphs.count if graphs is not None and step == 3 else early
    return torch.stack(logits), ids[:, : inputs["input_ids"].shape[1] + TOKENS], early


def static(vlm):
    length = vlm.prepare(PICTURE, "what is this")[0]["input_ids"].shape[1]
    return StaticCache(config=vlm.text.config, max_cache_len=length + TOKENS + 5)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_own_loop(name, kind):
    vlm = model_of(name)
    with vlm.recording(RULE) as recorded:
        truth, ids, _ = loop(vlm, vlm.model)
    expected = recorded.explanation(PICTURE, output=ids[:, :-4])
    plain, _, _ = loop(vlm, vlm.model)
    assert (plain - truth).abs().max() > 1e-3, "the knockout must matter"
    make = static if kind == "static" else lambda _: None
    with vlm.recording(RULE) as recorded:
        got, _, _ = loop(vlm, vlm.model, make(vlm))
    assert torch.equal(got, truth)
    graphs = Graphs()
    compiled = torch.compile(vlm.model, backend=graphs, fullgraph=True)
    with vlm.recording(RULE) as recorded:
        got, _, early = loop(vlm, compiled, make(vlm), graphs)
    assert torch.equal(got, truth)
    assert graphs.count == early, "a graph was made after the fourth token"
    found = recorded.explanation(PICTURE, output=ids[:, :-4])
    torch.testing.assert_close(found.head_scores, expected.head_scores, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.heatmap(2), expected.heatmap(2), rtol=0, atol=1e-9)
    got, _, _ = loop(vlm, compiled, make(vlm))
    assert torch.equal(got, plain), "outside a block the compiled model is the user's own"


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}])
def test_generate_of_a_compiled_model(options):
    vlm = model_of("llava")
    inputs, _ = vlm.prepare(PICTURE, "what is this")
    generate = lambda: vlm.model.generate(**inputs, do_sample=False, min_new_tokens=6, max_new_tokens=6, **options)  # noqa: E731
    with vlm.recording(RULE) as recorded:
        truth = generate()
    expected, plain = recorded.explanation(PICTURE), generate()
    graphs = Graphs()
    vlm.model.compile(backend=graphs, fullgraph=True)
    counts = []
    for _ in range(12):  # more blocks than torch's limit of recompilations
        with vlm.recording(RULE) as recorded:
            assert torch.equal(generate(), truth)
        found = recorded.explanation(PICTURE)
        torch.testing.assert_close(found.head_scores, expected.head_scores, rtol=0, atol=1e-9)
        torch.testing.assert_close(found.heatmap(1), expected.heatmap(1), rtol=0, atol=1e-9)
        counts.append(graphs.count)
    assert counts[-1] == counts[0]
    assert torch.equal(generate(), plain)
    explained = vlm.explain(PICTURE, "what is this", max_new_tokens=4, knockout=RULE)
    torch.testing.assert_close(explained.head_scores[:4], expected.head_scores[:4], rtol=0, atol=1e-9)


def test_nothing_of_a_block_is_held():
    """The hooks of a kind of block are kept with the model, what was recorded and the keys and values are not."""
    vlm = model_of("llava")
    inputs, _ = vlm.prepare(PICTURE, "what is this")
    with vlm.recording(RULE) as recorded:
        vlm.model.generate(**inputs, max_new_tokens=3)
    held = [weakref.ref(one) for one in (recorded._calls[0].cache, recorded._calls[0].record)]
    del recorded
    gc.collect()
    assert not any(one() is not None for one in held)


def test_gradients_of_a_compiled_model():
    vlm = model_of("llava")
    before = vlm.explain(PICTURE, "what is this", max_new_tokens=3).heatmap(1, "gradient-input")
    vlm.model.compile(backend=Graphs(), fullgraph=True)
    vlm.generate(PICTURE, "what is this", max_new_tokens=3)
    after = vlm.explain(PICTURE, "what is this", max_new_tokens=3).heatmap(1, "gradient-input")
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9)


def test_zeroed_inputs_of_layers_without_attention():
    vlm = model_of("lfm2_vl")
    rule = mf.Knockout("image", "query", zero_inputs=True)
    with vlm.knocked_out(rule):
        truth, _, _ = loop(vlm, vlm.model)
    compiled = torch.compile(vlm.model, backend=Graphs(), fullgraph=True)
    with vlm.knocked_out(rule):
        got, _, _ = loop(vlm, compiled)
    assert torch.equal(got, truth)


def test_prompts_one_after_the_other_and_a_foreign_cache():
    vlm = model_of("llava")
    compiled = torch.compile(vlm.model, backend=Graphs(), fullgraph=True)
    prompts = [vlm.prepare(PICTURE, text)[0] for text in ("what is this", "what is this thing", "what is this")]
    with torch.no_grad():
        with vlm.knocked_out(RULE):
            truth = [vlm.model(**one, use_cache=False).logits for one in prompts]
        with vlm.knocked_out(RULE):
            for one, expected in zip(prompts, truth, strict=True):
                torch.testing.assert_close(compiled(**one, use_cache=False).logits, expected, rtol=0, atol=1e-12)
        outside = cache_of(compiled(**prompts[0], use_cache=True))
        token = torch.tensor([[5]])
        with vlm.knocked_out(RULE), pytest.raises(mf.InputError, match="make the cache inside the block"):
            compiled(input_ids=token, use_cache=True, **{CACHE: outside})


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "paligemma"])
def test_maps_that_run_the_model_again_over_a_static_cache(name):
    vlm = model_of(name)
    dynamic, static = (
        vlm.explain(PICTURE, "what is this", max_new_tokens=4, **more)
        for more in ({}, {"cache_implementation": "static"})
    )
    for method in ("gradient-input", "rollout", "exhaustive"):
        torch.testing.assert_close(static.heatmap(0, method), dynamic.heatmap(0, method), rtol=0, atol=1e-6)


def test_streams_over_a_static_cache(picture):
    vlm = model_of("qwen2_5_vl")
    for options in ({}, {"knockout": RULE}):
        steps = [
            list(vlm.stream(picture, "what is this", max_new_tokens=5, explain=True, **options, **more))
            for more in ({}, {"cache_implementation": "static"})
        ]
        assert [one.token_id for one in steps[0]] == [one.token_id for one in steps[1]]
        for one, other in zip(*steps, strict=True):
            assert torch.equal(one.head_scores, other.head_scores)
            assert torch.equal(one.heatmap(), other.heatmap())


def test_a_static_window_is_refused_where_all_keys_are_read(picture):
    vlm = model_of("gemma3")
    with pytest.raises(mf.InputError, match="sliding window, and a static cache"):
        vlm.explain(picture, "what is this", cache_implementation="static")
    assert vlm.generate(picture, "what is this", knockout=RULE, cache_implementation="static").text is not None
