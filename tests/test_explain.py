"""Equivalences 3 and 4 end to end: an explanation in float64 against an oracle that runs the model's own
eager attention with output_attentions, makes every write and every logit, and knows nothing of ours."""

from __future__ import annotations

import pytest
import tiny
import torch
from PIL import Image

import mllm_fast as mf
from mllm_fast.runtime.hooks import recording
from mllm_fast.runtime.kv_cache import cache_of
from mllm_fast.runtime.trace import make_trace

QUESTION = "what color is the circle ?"
ANSWER = "red green , blue"


class Oracle:
    """Everything materialised for one sequence, from hooks on the model's own modules."""

    def __init__(self, vlm: mf.VLM, picture, answer: str):
        inputs, _ = vlm.prepare(picture, QUESTION)
        ids = vlm.processor.tokenizer(answer, add_special_tokens=False).input_ids
        self.prompt_length = inputs["input_ids"].shape[1]
        self.ids = ids
        extended = {**inputs}
        extended["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids])], 1)
        extended["attention_mask"] = torch.ones_like(extended["input_ids"])
        if "mm_token_type_ids" in extended:
            extended["mm_token_type_ids"] = torch.nn.functional.pad(extended["mm_token_type_ids"], (0, len(ids)))
        self.text = vlm.text
        self.values, self.outputs, handles = {}, {}, []
        for i, layer in enumerate(vlm.text.layers):
            attention = layer.self_attn
            handles.append(
                attention.v_proj.register_forward_hook(lambda m, a, o, i=i: self.values.__setitem__(i, o[0]))
            )
            handles.append(
                attention.o_proj.register_forward_hook(lambda m, a, o, i=i: self.outputs.__setitem__(i, o[0]))
            )
        finals = []
        handles.append(vlm.text.norm.register_forward_pre_hook(lambda m, a: finals.append(a[0][0])))
        with torch.no_grad(), tiny.eager(vlm.model):
            out = vlm.model(**extended, output_attentions=True, output_hidden_states=True)
        for handle in handles:
            handle.remove()
        self.hidden, self.attentions, self.final = out.hidden_states, out.attentions, finals[0]
        self.logits = out.logits[0]

    def writes(self, token: int, layer: int) -> torch.Tensor:
        """Position writes alpha_jp O_j v_jp, [H, N, d]."""
        row = self.prompt_length - 1 + token
        alpha = self.attentions[layer][0, :, row]
        heads, width = self.text.num_heads, self.text.head_dim
        values = self.values[layer].reshape(len(self.values[layer]), -1, width).transpose(0, 1)
        values = values.repeat_interleave(heads // len(values), 0)
        weight = self.text.outputs[layer].weight.detach()
        return torch.stack([
            alpha[j, :, None] * values[j] @ weight[:, j * width : (j + 1) * width].T for j in range(heads)
        ])  # fmt: skip

    def increase(self, token: int, layer: int, writes: torch.Tensor, norm: str) -> torch.Tensor:
        row = self.prompt_length - 1 + token
        h = self.hidden[layer][0, row]

        def log_prob(x):
            measured = x if norm == "own" else self.final[row]
            scale = torch.rsqrt(measured.square().mean(-1, keepdim=True) + self.text.norm.variance_epsilon)
            return torch.log_softmax(self.text.head(x * scale * self.text.norm.weight), -1)[..., self.ids[token]]

        with torch.no_grad():
            return log_prob(h + writes) - log_prob(h)


@pytest.fixture(scope="module")
def pair(family, built, picture):
    vlm = mf.VLM(*built(family))
    return vlm, Oracle(vlm, picture, ANSWER)


@pytest.mark.parametrize("norm", ["frozen", "own"])
def test_scores_equal_the_oracle(pair, picture, norm):
    vlm, oracle = pair
    ex = vlm.explain(picture, QUESTION, ANSWER, final_norm=norm)
    assert ex.token_ids == oracle.ids
    for token in range(len(oracle.ids)):
        positions = ex.position_scores(token, "all").reshape(ex.num_layers, ex.num_heads, -1)
        for layer in range(ex.num_layers):
            writes = oracle.writes(token, layer)
            heads = oracle.increase(token, layer, writes.sum(1), norm)
            # results are kept in float32: half an ulp of values up to about 8
            torch.testing.assert_close(ex.head_scores[token, layer].double(), heads, rtol=1e-6, atol=1e-7)
            each = oracle.increase(token, layer, writes, norm)
            got = positions[layer][:, : each.shape[1]].double()
            torch.testing.assert_close(got, each[:, : got.shape[1]], rtol=1e-6, atol=1e-7)
    assert ex.head_scores.abs().max() > 1e-2


def test_writes_add_up(pair, picture):
    """Equivalence 3, in float64: position writes make the head write, head writes and the bias the output."""
    vlm, oracle = pair
    for layer in range(len(vlm.text.layers)):
        bias = getattr(vlm.text.outputs[layer], "bias", None)
        for token in range(len(oracle.ids)):
            total = oracle.writes(token, layer).sum((0, 1)) + (0 if bias is None else bias.detach())
            row = oracle.outputs[layer][oracle.prompt_length - 1 + token]
            torch.testing.assert_close(total, row, rtol=0, atol=1e-10)
    inputs, _ = vlm.prepare(picture, QUESTION)
    with recording(vlm.text, rows=1) as record, torch.no_grad():
        cache = cache_of(vlm.model(**inputs, use_cache=True))
    trace = make_trace(vlm.text, record, cache, 1, oracle.prompt_length)
    for layer in range(len(vlm.text.layers)):
        heads = trace.output[0, layer]
        for head in range(vlm.text.num_heads):
            summed = trace.position_values(0, [(layer, head)])[0].sum(0)
            torch.testing.assert_close(summed, heads[head], rtol=0, atol=1e-10)
        bias = vlm.text.outputs[layer].bias
        written = vlm.text.outputs[layer].weight @ heads.flatten() + (0 if bias is None else bias)
        torch.testing.assert_close(
            written.detach(), oracle.outputs[layer][oracle.prompt_length - 1], rtol=0, atol=1e-10
        )


def test_attention_equals_the_models_own(pair, picture):
    vlm, oracle = pair
    ex = vlm.explain(picture, QUESTION, ANSWER)
    for token in range(len(oracle.ids)):
        row = oracle.prompt_length - 1 + token
        own = torch.stack([a[0, :, row] for a in oracle.attentions])
        torch.testing.assert_close(ex.attention(token).double(), own, rtol=0, atol=1e-7)


def test_explained_probability_is_the_models(pair, picture):
    """h after the last layer, through the unembedding as data, gives the model's own logits."""
    vlm, oracle = pair
    u = vlm.text.unembedding()
    x = oracle.final
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + u.eps)
    logits = u.times(normed.T).T
    # the model's own RMSNorm computes in float32: a few of its roundings of logits of order 10
    torch.testing.assert_close(logits[-1], oracle.logits[-1], rtol=0, atol=10 * 4 * 2**-24)


def test_generated_equals_forced(vlm, picture):
    """From the cache of one generation, or from one teacher-forced pass: the same numbers."""
    words = tiny._WORDS
    allowed = vlm.processor.tokenizer.convert_tokens_to_ids(words)
    said = vlm.explain(picture, QUESTION, max_new_tokens=4, prefix_allowed_tokens_fn=lambda *_: allowed)
    forced = vlm.explain(picture, QUESTION, said.text)
    assert forced.token_ids == said.token_ids
    assert torch.equal(forced.input_ids, said.input_ids)
    torch.testing.assert_close(forced.head_scores, said.head_scores, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(forced.position_scores(-1, "all"), said.position_scores(-1, "all"), rtol=1e-6, atol=1e-7)


def test_generate_and_explain_say_the_same(vlm, picture):
    said = vlm.generate(picture, QUESTION, max_new_tokens=5)
    ex = vlm.explain(picture, QUESTION, max_new_tokens=5)
    assert (ex.text, ex.token_ids) == (said.text, said.token_ids)
    assert said.input_ids[said.layout.prompt_length :].tolist() == said.token_ids
    assert len(said.tokens) == len(said.token_ids)


def test_heatmap_is_the_sum_over_the_image(vlm, picture):
    ex = vlm.explain(picture, QUESTION, ANSWER)
    where = ex.layout.images[0].positions
    heads = [(2, 1), (0, 0)]
    grid = ex.heatmap(1, heads=heads)
    assert grid.shape == ex.layout.images[0].grid
    torch.testing.assert_close(grid.sum(), ex.position_scores(1, heads)[:, where].sum())
    attention = ex.heatmap(1, "attention")
    torch.testing.assert_close(attention.sum(), ex.attention(1).mean((0, 1))[where].sum())


def test_two_images(vlm, picture):
    other = Image.new("RGB", (40, 40), "red")
    ex = vlm.explain([picture, other], QUESTION, ANSWER)
    segments = ex.layout.segments
    assert len(segments["image"]) == len(segments["image:0"]) + len(segments["image:1"])
    assert ex.heatmap(0, image=1).shape == ex.layout.images[1].grid
    with pytest.raises(mf.InputError, match="image is 0 to 1"):
        ex.heatmap(0, image=2)


def test_tokens_by_name(vlm, picture):
    ex = vlm.explain(picture, QUESTION, "red blue red")
    assert ex.token_index("blue") == 1
    assert ex.token_index(-1) == 2
    with pytest.raises(mf.InputError, match="stands 2 times"):
        ex.token_index("red")
    with pytest.raises(mf.InputError, match="is not in the answer"):
        ex.token_index("green")
    with pytest.raises(mf.InputError, match="index is 0 to 2"):
        ex.token_index(3)


def test_top_heads_are_sorted(vlm, picture):
    ex = vlm.explain(picture, QUESTION, ANSWER)
    top = ex.top_heads(0, 4)
    scores = [score for _, _, score in top]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == float(ex.head_scores[0].max())
    layer, head, score = top[2]
    assert float(ex.head_scores[0, layer, head]) == score


@pytest.mark.parametrize("heads", [0, "some", [(9, 0)], [], True])
def test_bad_heads(vlm, picture, heads):
    with pytest.raises(mf.InputError):
        vlm.explain(picture, QUESTION, ANSWER).position_scores(0, heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_precisions(picture, dtype):
    """Scores of a low-precision model are near those of the same weights in float64: within the change that
    rounding its recorded rows and cache makes, 2^-8 or 2^-23 of values of order 1, through three layers."""
    model, processor = tiny.internvl()
    low = mf.VLM(model.to(dtype), processor).explain(picture, QUESTION, ANSWER)
    model, _ = tiny.internvl()
    exact = mf.VLM(model.to(dtype).double(), processor).explain(picture, QUESTION, ANSWER)
    # a few roundings of values of order 1 in each of three layers
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(low.head_scores, exact.head_scores, rtol=0, atol=tolerance)
    assert exact.head_scores.abs().max() > 8 * tolerance, "the tolerance must mean something"


def test_left_padding_changes_nothing(pair, picture):
    """A padded row of a batch leaves the trace that it leaves alone: padding is never attended to. Padding
    shifts positions, and transformers' rotary angles are float32: a few of their roundings are allowed."""
    vlm, _ = pair

    def prompt(question):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return vlm.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def trace(texts, index):
        images = [[picture]] * len(texts)
        inputs = vlm.processor(images=images, text=texts, return_tensors="pt", padding=True)
        inputs["pixel_values"] = inputs["pixel_values"].double()
        with recording(vlm.text, rows=1) as record, torch.no_grad():
            cache = cache_of(vlm.model(**inputs, use_cache=True))
        return make_trace(vlm.text, record, cache, 1, inputs["input_ids"].shape[1], batch_index=index)

    alone = trace([prompt("describe this")], 0)
    padded = trace([prompt(QUESTION + " red green blue"), prompt("describe this")], 1)
    padding = int(padded.rows[0] - alone.rows[0])
    assert padding > 0
    for layer in range(len(vlm.text.layers)):
        alpha = padded.attention(0, layer)
        assert alpha[:, :padding].abs().max() == 0
        torch.testing.assert_close(alpha[:, padding:], alone.attention(0, layer), rtol=0, atol=1e-6)
        torch.testing.assert_close(padded.output[0, layer], alone.output[0, layer], rtol=0, atol=1e-5)


def test_end_of_sequence_is_not_a_word(shapes, picture):
    said = shapes.generate(picture, "How many objects are there?")
    assert len(said.tokens) == 1
    assert shapes.processor.tokenizer.eos_token_id not in said.token_ids
    assert shapes.explain(picture, "How many objects are there?").tokens == said.tokens


def test_operators_are_kept_and_renewed(picture):
    """Explaining again finds the operators it made; after a change of the weights it does not use them."""
    model, processor = tiny.internvl()
    vlm = mf.VLM(model, processor)
    heads = [(0, 1), (1, 4)]
    # many positions a head make the factored way pay even on a tiny model
    first = vlm.explain(picture, QUESTION, ANSWER).position_scores(0, heads)
    kept = vlm.operators.nbytes
    assert kept > 0
    again = vlm.explain(picture, QUESTION, ANSWER).position_scores(0, heads)
    assert vlm.operators.nbytes == kept
    assert torch.equal(first, again)
    with torch.no_grad():
        vlm.text.outputs[1].weight[:, 32:40] *= 2  # head 4's part
    changed = vlm.explain(picture, QUESTION, ANSWER).position_scores(0, heads)
    fresh = mf.VLM(model, processor).explain(picture, QUESTION, ANSWER).position_scores(0, heads)
    assert torch.equal(changed, fresh)
    assert not torch.equal(changed[1], again[1])


def test_other_ways_to_generate_are_refused(vlm, picture):
    """Passes that are not one a token would be taken for others; a checkpoint's own beams are switched off."""
    plain = vlm.explain(picture, QUESTION, max_new_tokens=4)
    for options in ({"guidance_scale": 1.5}, {"prefill_chunk_size": 7}):
        with pytest.raises((ValueError, RuntimeError)):  # Qwen's own code fails on chunks first
            vlm.explain(picture, QUESTION, max_new_tokens=4, **options).head_scores  # noqa: B018
    config = vlm.model.generation_config
    config.num_beams, config.use_cache = 4, False
    try:
        with pytest.raises(mf.InputError, match="num_beams=4 by the checkpoint"):
            vlm.explain(picture, QUESTION, max_new_tokens=4)
        ex = vlm.explain(picture, QUESTION, max_new_tokens=4, num_beams=1)
    finally:
        config.num_beams, config.use_cache = 1, True
    assert ex.token_ids == plain.token_ids
    torch.testing.assert_close(ex.head_scores, plain.head_scores)


def test_threads_do_not_meet(vlm, picture):
    from concurrent.futures import ThreadPoolExecutor

    alone = vlm.explain(picture, QUESTION, ANSWER).head_scores
    other = mf.VLM(vlm.model, vlm.processor)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(v.explain, picture, QUESTION, ANSWER) for v in (vlm, other) * 4]
        said = [pool.submit(vlm.generate, picture, QUESTION, max_new_tokens=3) for _ in range(4)]
        for job in jobs:
            torch.testing.assert_close(job.result().head_scores, alone)
        assert len({job.result().text for job in said}) == 1


def test_recordings_are_not_nested(vlm):
    with recording(vlm.text, rows=1), pytest.raises(RuntimeError, match="being recorded already"):
        recording(vlm.text, rows=1).__enter__()


def test_quantised_weights_are_refused():
    model, processor = tiny.llava()
    attention = model.model.language_model.layers[1].self_attn
    attention.o_proj.weight = torch.nn.Parameter(attention.o_proj.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(mf.InputError, match="Float8"):
        mf.VLM(model, processor)


@pytest.mark.parametrize("together", [True, False])
def test_projections_are_those_of_the_weight_there_is(built, together, monkeypatch):
    """Kept views, or copies, of one that was replaced, moved or trained are not used."""
    vlm = mf.VLM(*built("llava"))
    monkeypatch.setattr("mllm_fast.models.output_weights._STACKED_BYTES", together << 25)

    def everywhere():
        found = list(vlm.text.writes.projections(kept.device, kept.dtype))
        assert len(found) == (1 if together else len(vlm.text.layers))
        assert [layer for some, _ in found for layer in range(some.start, some.stop)] == [*range(len(vlm.text.layers))]
        return torch.cat([weight for _, weight in found])[0, 1].mT

    linear, kept = vlm.text.outputs[0], vlm.text.outputs[0].weight
    first = vlm.text.projection(0, 1).clone()
    assert torch.equal(everywhere(), first)
    try:
        linear.weight = torch.nn.Parameter(2 * kept.detach())
        assert torch.equal(vlm.text.projection(0, 1), 2 * first)
        assert torch.equal(everywhere(), 2 * first)
        linear.weight.data = 2 * linear.weight.data
        assert torch.equal(vlm.text.projection(0, 1), 4 * first)
        assert torch.equal(everywhere(), 4 * first)
        with torch.no_grad():
            linear.weight.mul_(2)
        assert torch.equal(everywhere(), 8 * first)
    finally:
        linear.weight = kept
    assert torch.equal(vlm.text.projection(0, 1), first)


def test_the_logits_of_a_word_are_made_once(shapes, picture, monkeypatch):
    """Heads, and positions of any of them, write to the same residual vectors: one product with the unembedding."""
    from mllm_fast.explain import write_scores

    ex = shapes.explain(picture, "what color is the star?", "a star")  # of one word the scores are made in another way
    made = []
    base = write_scores.Base
    monkeypatch.setattr(write_scores, "Base", lambda *arguments: made.append(len(arguments[0])) or base(*arguments))
    first = ex.position_scores(0, 3)
    ex.position_scores(0, [(0, 0), (5, 3)])
    ex.heatmap(0)
    assert made == [len(ex.tokens) * ex.num_layers]
    ex.forget()
    assert torch.equal(ex.position_scores(0, 3), first)
    assert len(made) == 2


def test_what_is_given_is_the_callers_own(shapes, picture):
    ex = shapes.explain(picture, "what color is the star?")
    first = ex.position_scores(0, 3)
    kept = first.clone()
    first.zero_()
    assert torch.equal(ex.position_scores(0, 3), kept)
