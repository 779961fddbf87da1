"""A stream says what `generate` says and explains what `explain` explains, whatever comes between its steps, and leaves
the model as it was."""

from __future__ import annotations

import copy
from operator import attrgetter

import knocked
import pytest
import torch
from knocked import Rule
from PIL import Image

import mllm_fast as mf
from mllm_fast.runtime.kv_cache import CACHE, cache_of

QUESTION = "what color is the circle ?"
WORDS = 6
RULE = mf.Knockout("image", "query+generated", "from 1")
RED = Image.new("RGB", (24, 64), "red")
WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 1.5, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.2},
    "under knockouts": {"knockout": [RULE, mf.Knockout("system", "generated")]},
    "sampled under knockouts": {"do_sample": True, "knockout": RULE},
}


@pytest.fixture(params=[*WAYS.values()], ids=[*WAYS])
def way(request):
    return request.param


def said_by_generate(vlm, image, prompt=QUESTION, **options):
    torch.manual_seed(11)
    return vlm.generate(image, prompt, **{"max_new_tokens": WORDS, **options})


def kept(vlm):
    """What may not change, by value: weights, what the model keeps of a sequence, how it is set up."""
    state = [copy.deepcopy(attrgetter(name)(vlm.model)) for name in vlm.text.findings.state]
    hooks = [m for m in vlm.model.modules() if m._forward_pre_hooks or m._forward_hooks]
    weights = {name: tensor.clone() for name, tensor in vlm.model.state_dict().items()}
    return state, hooks, vlm.text.config._attn_implementation, weights


def assert_untouched(vlm, before):
    state, hooks, implementation, weights = kept(vlm)
    for now, then in zip(state, before[0], strict=True):
        assert (now is None and then is None) or torch.equal(now, then)
    assert (hooks, implementation) == before[1:3]
    assert all(torch.equal(weights[name], tensor) for name, tensor in before[3].items())


@pytest.mark.parametrize("explain", [False, True])
def test_says_what_generate_says(vlm, picture, way, explain):
    said = said_by_generate(vlm, picture, **way)
    torch.manual_seed(11)
    stream = vlm.stream(picture, QUESTION, explain=explain, max_new_tokens=WORDS, **way)
    steps = list(stream)
    assert [step.token_id for step in steps] == said.token_ids
    assert [step.token for step in steps] == said.tokens
    assert [step.index for step in steps] == list(range(len(steps)))
    answer = stream.answer
    assert (answer.text, answer.token_ids, answer.tokens) == (said.text, said.token_ids, said.tokens)
    assert torch.equal(answer.input_ids, said.input_ids)
    assert answer.layout.length == said.layout.length
    assert answer.attention_share is None
    assert list(stream) == []


def test_the_embedded_model(shapes, picture):
    """Several words, an end-of-sequence token that is no step, text that grows."""
    for options in ({}, {"knockout": RULE}, {"do_sample": True}):
        torch.manual_seed(2)
        said = shapes.generate(picture, "describe the image.", **options)
        torch.manual_seed(2)
        steps = list(shapes.stream(picture, "describe the image.", **options))
        assert [step.token_id for step in steps] == said.token_ids
        assert [step.token for step in steps] == said.tokens
        assert steps[-1].text == said.text
        assert all(said.text.startswith(step.text) for step in steps)


def test_a_padding_token_may_be_said(vlm, picture):
    """It ends nothing for `generate`; only what stands after the answer is taken away."""
    length = vlm.prepare(picture, QUESTION)[0]["input_ids"].shape[1]
    tokenizer = vlm.processor.tokenizer
    ids = [*tokenizer("red blue").input_ids, tokenizer.pad_token_id, *tokenizer("green").input_ids]
    says = [*ids, tokenizer.eos_token_id]
    options = {"prefix_allowed_tokens_fn": lambda _, now: [says[len(now) - length]], "max_new_tokens": 9}
    said = vlm.generate(picture, QUESTION, **options)
    assert said.token_ids == ids
    stream = vlm.stream(picture, QUESTION, **options)
    steps = list(stream)
    assert [step.token_id for step in steps] == stream.answer.token_ids == ids
    assert steps[-1].text == said.text == "red blue green"


def test_log_probabilities_are_the_models(vlm, picture):
    """Of the token, before sampling settings."""
    torch.manual_seed(11)
    stream = vlm.stream(picture, QUESTION, max_new_tokens=WORDS, do_sample=True, temperature=3.0)
    steps = list(stream)
    inputs, _ = vlm.prepare(picture, QUESTION)
    ids = [step.token_id for step in steps]
    for step in steps:
        with torch.no_grad():
            out = vlm.model.generate(
                **inputs,
                max_new_tokens=step.index + 1,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                prefix_allowed_tokens_fn=lambda _, now: [ids[len(now) - stream.layout.prompt_length]],
            )
        expected = torch.log_softmax(out.logits[-1][0], -1)[step.token_id]
        assert step.log_prob == pytest.approx(float(expected), abs=1e-5)  # a few roundings of float32 logits of 10


@pytest.mark.parametrize("later", [False, True], ids=["as it goes", "after the last"])
@pytest.mark.parametrize("knockout", [None, RULE], ids=["open", "knocked out"])
def test_steps_explain_what_explain_explains(vlm, picture, knockout, later):
    """Of the whole answer, whether a step is asked at once or when the cache has grown."""
    ex = vlm.explain(picture, QUESTION, knockout=knockout, max_new_tokens=4)
    stream = vlm.stream(picture, QUESTION, explain=True, knockout=knockout, max_new_tokens=4)
    steps = list(stream) if later else stream
    count = 0
    for i, step in enumerate(steps):
        torch.testing.assert_close(step.head_scores, ex.head_scores[i], rtol=1e-6, atol=1e-7)
        assert [head[:2] for head in step.top_heads(3)] == [head[:2] for head in ex.top_heads(i, 3)]
        length = stream.layout.prompt_length + i + 1
        scores = step.position_scores("all")
        assert scores.shape[1] == length
        expected = ex.position_scores(i, "all")
        torch.testing.assert_close(scores, expected[:, :length], rtol=1e-6, atol=1e-7)
        assert (expected[:, length:] == 0).all()
        torch.testing.assert_close(step.attention(), ex.attention(i)[..., :length], rtol=1e-6, atol=1e-7)
        for method in ("logprob", "attention"):
            torch.testing.assert_close(step.heatmap(method), ex.heatmap(i, method), rtol=1e-6, atol=1e-6)
        count += 1
    assert count == len(ex.tokens) >= 3


def test_steps_of_own_norm(vlm, picture):
    ex = vlm.explain(picture, QUESTION, final_norm="own", max_new_tokens=2)
    steps = list(vlm.stream(picture, QUESTION, explain=True, final_norm="own", max_new_tokens=2))
    torch.testing.assert_close(steps[1].head_scores, ex.head_scores[1], rtol=1e-6, atol=1e-7)


def test_other_calls_between_steps_change_nothing(vlm, picture):
    """generate, explain and other streams, with images and prompts of other lengths, between any two steps: Qwen
    keeps the offset of its rotary positions on the model."""
    expected = said_by_generate(vlm, picture).token_ids
    other = said_by_generate(vlm, [RED, picture], "describe this picture").token_ids
    first = vlm.stream(picture, QUESTION, explain=True, max_new_tokens=WORDS)
    second = vlm.stream([RED, picture], "describe this picture", knockout=None, max_new_tokens=WORDS)
    got: tuple[list, list] = ([], [])
    for i in range(WORDS):
        for stream, ids in ((first, got[0]), (second, got[1])):
            if i % 3 == 0:
                vlm.generate([RED, picture], ["two", QUESTION], max_new_tokens=2, knockout=RULE)
            elif i % 3 == 1:
                vlm.explain([picture, RED], "red", "green blue").verify(controls=1)
            ids += [step.token_id for step in [next(stream, None)] if step is not None]
    assert got == (expected, other)


def test_the_model_is_not_touched_between_steps(vlm, picture):
    """Not by opening a stream, nor by its steps: what Qwen keeps for a sequence at hand, too."""
    vlm.generate(RED, "two", max_new_tokens=2)
    before = kept(vlm)
    stream = vlm.stream(picture, QUESTION, explain=True, knockout=RULE, max_new_tokens=WORDS)
    assert_untouched(vlm, before)
    for _ in stream:
        assert_untouched(vlm, before)
    assert_untouched(vlm, before)


def test_a_step_finds_what_the_model_kept_of_its_sequence(built, picture):
    """Qwen's offset of rotary positions, in every pass, though others have run since."""
    vlm = mf.VLM(*built("qwen2_5_vl"))
    vlm.generate(picture, QUESTION, max_new_tokens=1)
    own = vlm.model.model.rope_deltas.clone()
    found = []
    stream = vlm.stream(picture, QUESTION, max_new_tokens=4)
    for _ in range(4):
        vlm.generate(RED, "two", max_new_tokens=1)
        assert not torch.equal(vlm.model.model.rope_deltas, own)
        handle = vlm.text.decoder.register_forward_pre_hook(
            lambda *_: found.append(vlm.model.model.rope_deltas.clone())
        )
        next(stream, None)
        handle.remove()
    assert len(found) >= 3
    assert all(torch.equal(one, own) for one in found)


@pytest.mark.parametrize("how", ["close", "with", "abandon", "break", "exception outside", "exception inside"])
def test_leaving_early(vlm, picture, how):
    inputs, _ = vlm.prepare(picture, QUESTION)
    with torch.no_grad():
        logits = vlm.model(**inputs).logits
    before = kept(vlm)
    stream = vlm.stream(picture, QUESTION, explain=True, knockout=RULE, max_new_tokens=WORDS)
    step = next(stream)
    if how == "close":
        stream.close()
        stream.close()
    elif how in ("with", "exception outside"):
        with pytest.raises(ZeroDivisionError) if how != "with" else stream, stream:
            next(stream)
            if how != "with":
                raise ZeroDivisionError
    elif how == "break":
        for _ in stream:
            break
    elif how == "exception inside":

        def stop(*_):
            raise ZeroDivisionError

        handle = vlm.text.layers[1].mlp.register_forward_hook(stop)
        with pytest.raises(ZeroDivisionError):
            next(stream)
        handle.remove()
    if how not in ("abandon", "break"):
        assert next(stream, None) is None
    else:
        del stream
    assert_untouched(vlm, before)
    assert step.head_scores.isfinite().all(), "a step keeps what its scores need"
    with torch.no_grad():
        assert torch.equal(vlm.model(**inputs).logits, logits)
    assert said_by_generate(vlm, picture).token_ids


def test_a_knockout_set_between_steps(vlm, picture):
    """It takes effect from the next step on; what is in the cache stays. Against decoding by hand."""
    inputs, layouts, _ = vlm.prompts.prepare([[picture]], [QUESTION])
    later = [Rule("image+query", "generated", "from 1", (1, 2))]

    def by_hand():
        """The first two tokens open to all, two under the rule, the rest open again."""
        out, ids, sequence = None, [], inputs["input_ids"]
        for i in range(6):
            rules = later if 2 <= i < 4 else []
            with torch.no_grad(), knocked.eager(vlm, rules, layouts):
                if out is None:
                    out = vlm.model(**inputs, use_cache=True)
                else:
                    out = vlm.model(input_ids=sequence[:, -1:], **{CACHE: cache_of(out)})
            scores = out.logits[:, -1].clone()
            scores[:, stop] = -torch.inf
            sequence = torch.cat([sequence, scores.argmax(-1, keepdim=True)], 1)
            ids.append((int(sequence[0, -1]), float(torch.log_softmax(out.logits[0, -1], -1)[sequence[0, -1]])))
        return ids

    stop = [*vlm.settings().stop_ids]
    stream = vlm.stream(picture, QUESTION, max_new_tokens=6, suppress_tokens=stop)
    got = []
    for i in range(6):
        if i == 2:
            stream.knockout = [rule.knockout for rule in later]
        if i == 4:
            stream.knockout = None
        step = next(stream)
        got.append((step.token_id, step.log_prob))
    expected = by_hand()
    assert [one[0] for one in got] == [one[0] for one in expected]
    for (_, ours), (_, theirs) in zip(got, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    plain = list(vlm.stream(picture, QUESTION, max_new_tokens=6, suppress_tokens=stop))
    assert [one[1] for one in got[:2]] == [step.log_prob for step in plain[:2]]
    assert abs(got[2][1] - plain[2].log_prob) > 1e-3 or got[2][0] != plain[2].token_id


def test_the_rules_in_force(vlm, picture):
    stream = vlm.stream(picture, QUESTION, knockout=RULE, max_new_tokens=3)
    assert stream.knockout == (RULE,)
    with pytest.raises(mf.InputError, match="got 'words'"):
        stream.knockout = mf.Knockout("words", "query")
    assert stream.knockout == (RULE,), "a rule that is refused changes nothing"
    stream.knockout = None
    assert stream.knockout == ()


def test_the_answer_so_far(vlm, picture):
    """And the attention share so far: that of `generate` cut there."""
    stream = vlm.stream(picture, QUESTION, attention_share=True, max_new_tokens=4)
    assert stream.answer.text == ""
    assert stream.answer.token_ids == []
    assert stream.answer.attention_share is None
    for step in stream:
        said = vlm.generate(picture, QUESTION, attention_share=True, max_new_tokens=step.index + 1)
        now = stream.answer
        assert (now.token_ids, now.text) == (said.token_ids, said.text)
        assert step.text == now.text or vlm.processor.tokenizer.all_special_ids
        assert (now.attention_share is None) == (said.attention_share is None) == (step.index == 0)
        for name, share in (said.attention_share or {}).items():
            torch.testing.assert_close(now.attention_share[name], share, rtol=0, atol=1e-6)


def test_errors(vlm, picture):
    with pytest.raises(mf.InputError, match="stream follows one sequence, got num_beams=2"):
        vlm.stream(picture, QUESTION, num_beams=2)
    with pytest.raises(mf.InputError, match="norm is 'frozen' or 'own', got 'mine'"):
        vlm.stream(picture, QUESTION, final_norm="mine")
    with pytest.raises(mf.InputError, match="max_new_tokens is at least 1, got 0"):
        vlm.stream(picture, QUESTION, max_new_tokens=0)
    step = next(vlm.stream(picture, QUESTION))
    for ask in (step.heatmap, step.position_scores, step.attention, step.top_heads, lambda: step.head_scores):
        with pytest.raises(mf.InputError, match=r"not recorded; call stream\(..., explain=True\)"):
            ask()


def test_one_line_for_what_a_cell_shows(shapes):
    from mllm_fast.core.assets import SAMPLE

    question = "What color is the star?"
    assert repr(shapes.generate(SAMPLE, question)) == "Answer('blue', 1 tokens, finish_reason='stop')"
    assert repr(shapes.explain(SAMPLE, question)) == f"Explanation('blue', 1 tokens, 1 image, prompt={question!r})"
    with shapes.stream(SAMPLE, question) as stream:
        (step,) = stream
    assert repr(step) == f"Step(0, 'blue', log_prob={step.log_prob:.3f})"


@pytest.mark.parametrize("static", [False, True])
def test_log_probs_are_those_before_a_processor_that_writes_in_place(shapes, picture, static):
    def lean(ids, scores):
        return scores - torch.arange(scores.shape[1]) / 9

    def lean_in_place(ids, scores):
        return scores.sub_(torch.arange(scores.shape[1]) / 9)

    found = []
    for processor in (lean, lean_in_place):
        options = {"logits_processor": [processor], "max_new_tokens": 5, "static": static}
        steps = list(shapes.stream(picture, "Describe the image.", **options))
        found.append([(step.token_id, step.log_prob) for step in steps])
    assert found[0]
    assert found[0] == found[1]
