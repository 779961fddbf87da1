"""Options of transformers' `generate`: as there, in every way to an answer, or refused by name."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria

import mllm_fast as mf
from mllm_fast.core.assets import SAMPLE
from mllm_fast.runtime.stop_strings import StopStrings

ASKED = "Describe the image."
WAYS = ("generate", "explain", "stream", "ask", "explained over a context", "streamed over a context", "chat")


@pytest.fixture(scope="module")
def vlm(shapes):
    return shapes


@pytest.fixture(scope="module")
def ctx(vlm):
    return vlm.compress(SAMPLE, keep=1.0)


@pytest.fixture
def checkpoint(vlm):
    """The checkpoint's own settings, which may be changed."""
    before = vlm.model.generation_config
    vlm.model.generation_config = copy.deepcopy(before)
    yield vlm.model.generation_config
    vlm.model.generation_config = before


def said(vlm, ctx, way, **options):
    """The answer (or explanation) by one of the ways."""
    if way in ("generate", "explain"):
        return getattr(vlm, way)(SAMPLE, ASKED, **options)
    if way in ("stream", "streamed over a context"):
        stream = vlm.stream(SAMPLE, ASKED, **options) if way == "stream" else ctx.stream(ASKED, **options)
        with stream:
            for _ in stream:
                pass
        return stream.answer
    if way == "chat":
        return ctx.chat().ask(ASKED, **options)
    return (ctx.ask if way == "ask" else ctx.explain)(ASKED, **options)


def own(vlm, way, **options):
    """What `model.generate` gives, as ids without the prompt."""
    if way in ("generate", "explain", "stream"):
        inputs, _ = vlm.prepare(SAMPLE, ASKED)
    else:  # the whole conversation that a context stands for
        prompts = vlm.prompts
        first = prompts.inputs([prompts.load(SAMPLE)], ["Describe the image."])
        ids = torch.tensor([prompts.turn_ids("Describe the image.", 1, ASKED)])
        inputs = dict(first) | {"input_ids": torch.cat([first["input_ids"], ids], 1)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    out = vlm.model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()
    return [one for one in out if one not in vlm.settings(None, options).stop_ids]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "options",
    [
        {"generation_config": GenerationConfig(max_new_tokens=6)},
        {"generation_config": GenerationConfig(max_new_tokens=40, repetition_penalty=1.7, eos_token_id=2)},
        {"max_new_tokens": 40, "no_repeat_ngram_size": 1},
        {"max_length": 166},
        {"generation_config": GenerationConfig(max_length=167)},
        {"max_new_tokens": 9, "min_new_tokens": 9},
        {"max_new_tokens": 40, "eos_token_id": [6]},
        {"max_new_tokens": 7, "suppress_tokens": [9]},
    ],
    ids=lambda given: ",".join(given),
)
def test_answers_are_those_of_model_generate(vlm, ctx, way, options):
    assert said(vlm, ctx, way, **copy.deepcopy(options)).token_ids == own(vlm, way, **copy.deepcopy(options))


@pytest.mark.parametrize("way", WAYS)
def test_the_checkpoint_s_settings_count_where_the_caller_says_nothing(vlm, ctx, way, checkpoint):
    checkpoint.max_new_tokens = 4
    assert len(said(vlm, ctx, way).token_ids) == 4
    assert len(said(vlm, ctx, way, max_new_tokens=6).token_ids) == 6
    checkpoint.max_new_tokens, checkpoint.max_length = None, 170
    assert len(said(vlm, ctx, way).token_ids) == len(own(vlm, way))
    checkpoint.max_length = 10**9  # beyond the model's window
    assert said(vlm, ctx, way).finish_reason == "stop"
    checkpoint.max_length, checkpoint.repetition_penalty = None, 1.7
    assert said(vlm, ctx, way).token_ids == own(vlm, way, max_new_tokens=32)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("whose", ["option", "caller's config", "checkpoint"])
def test_sampling_by_whoever_asks_for_it(vlm, ctx, way, whose, checkpoint):
    wanted = {"do_sample": True, "temperature": 5.0, "top_k": 0}
    options = wanted if whose == "option" else {}
    if whose == "caller's config":
        options = {"generation_config": GenerationConfig(**wanted)}
    if whose == "checkpoint":
        checkpoint.update(**wanted)
    texts = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        texts.append(said(vlm, ctx, way, max_new_tokens=8, **options).token_ids)
    assert texts[0] == texts[2] != texts[1]
    if whose == "checkpoint":
        greedy = said(vlm, ctx, way, max_new_tokens=8, do_sample=False).token_ids
        assert greedy == own(vlm, way, max_new_tokens=8, do_sample=False)


def test_what_a_context_keeps_is_no_matter_of_chance(vlm, checkpoint):
    checkpoint.update(do_sample=True, temperature=5.0)
    first, second = (vlm.compress(SAMPLE, keep=0.1) for _ in range(2))
    assert torch.equal(first.positions, second.positions)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stop", ["ring", ["square", " white r"], ["or"]])
def test_stop_strings(vlm, ctx, way, stop, checkpoint):
    """The answer ends with the token that completes one of them, which transformers' criterion defines so, too."""
    whole = said(vlm, ctx, way, max_new_tokens=40)
    made = said(vlm, ctx, way, max_new_tokens=40, stop_strings=stop)
    stops = [stop] if isinstance(stop, str) else stop
    tokenizer = vlm.processor.tokenizer
    lengths = range(1, len(whole.token_ids) + 1)
    first = next(n for n in lengths if any(one in tokenizer.decode(whole.token_ids[:n]) for one in stops))
    assert made.token_ids == whole.token_ids[:first]
    assert made.finish_reason == "stop"
    checkpoint.stop_strings = stop
    assert said(vlm, ctx, way, max_new_tokens=40).token_ids == made.token_ids
    config = GenerationConfig(stop_strings=stop, max_new_tokens=first)
    assert said(vlm, ctx, way, generation_config=config).finish_reason == "stop"  # at the limit, too
    assert said(vlm, ctx, way, max_new_tokens=1, stop_strings=["zebra"]).finish_reason == "length"


class _AfterFour(StoppingCriteria):
    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores, **_):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length + 4)


@pytest.mark.parametrize("way", ["generate", "explain", "stream"])
def test_a_criterion_of_the_caller_s_is_no_limit_of_length(vlm, ctx, way):
    length = vlm.prepare(SAMPLE, ASKED)[0]["input_ids"].shape[1]
    made = said(vlm, ctx, way, max_new_tokens=9, stopping_criteria=[_AfterFour(length)])
    assert len(made.token_ids) == 4
    assert made.finish_reason == "stop"


def test_several_answers_come_in_the_order_of_generate(vlm):
    options = {"num_return_sequences": 3, "do_sample": True, "temperature": 5.0, "top_k": 0, "max_new_tokens": 5}
    questions = [ASKED, "What color is the star?"]
    torch.manual_seed(0)
    made = vlm.generate([SAMPLE, SAMPLE], questions, **options)
    pictures = [vlm.prompts.load(SAMPLE)] * 2
    inputs = vlm.prompts.inputs(pictures, questions)
    torch.manual_seed(0)
    wanted = vlm.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    stops = vlm.settings().stop_ids
    assert len(made) == 6
    for answer, ids in zip(made, wanted.tolist(), strict=True):
        while ids and ids[-1] in stops:
            ids.pop()
        assert answer.token_ids == ids
    assert [one.layout.prompt_length for one in made] == [made[0].layout.prompt_length] * 3 + [
        made[3].layout.prompt_length
    ] * 3
    beams = vlm.generate(SAMPLE, ASKED, num_beams=3, num_return_sequences=2, max_new_tokens=5)
    assert isinstance(beams, list)
    assert len({one.text for one in beams}) == 2


REFUSED = {
    "num_beams": 2,
    "num_return_sequences": 2,
    "assistant_model": object(),
    "prompt_lookup_num_tokens": 3,
    "custom_generate": lambda: None,
    "streamer": object(),
    "cache_implementation": "quantized",
    "use_cache": False,
    "prefill_chunk_size": 8,
    "output_attentions": True,
    "return_dict_in_generate": True,
}


@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize("name", REFUSED)
def test_what_follows_one_answer_refuses_the_rest_by_name(vlm, ctx, way, name):
    with pytest.raises(mf.InputError, match=name):
        said(vlm, ctx, way, **{name: REFUSED[name]})
    if name in ("num_beams", "prompt_lookup_num_tokens", "use_cache"):
        with pytest.raises(mf.InputError, match=name):
            said(vlm, ctx, way, generation_config=GenerationConfig(**{name: REFUSED[name]}))


def test_beams_of_the_checkpoint_are_said_to_be_its_own(vlm, checkpoint):
    checkpoint.num_beams = 3
    with pytest.raises(mf.InputError, match=r"num_beams=3 by the checkpoint \(pass num_beams=1\)"):
        vlm.explain(SAMPLE, ASKED)
    assert vlm.explain(SAMPLE, ASKED, num_beams=1, max_new_tokens=2).tokens


@pytest.mark.parametrize("name", ["output_scores", "output_logits", "return_dict_in_generate", "output_attentions"])
def test_generate_says_what_an_answer_cannot_hold(vlm, name):
    with pytest.raises(mf.InputError, match=f"generate returns no {name}"):
        vlm.generate(SAMPLE, ASKED, **{name: True})


def test_knockouts_and_tokens_that_are_guessed_ahead(vlm):
    knockout = mf.Knockout("image", "generated")
    with pytest.raises(mf.InputError, match="a knockout cannot be had with prompt_lookup_num_tokens"):
        vlm.generate(SAMPLE, ASKED, knockout=knockout, prompt_lookup_num_tokens=3)
    alone = vlm.generate(None, ASKED, max_new_tokens=12)
    assert vlm.generate(None, ASKED, max_new_tokens=12, prompt_lookup_num_tokens=3).token_ids == alone.token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is at least 1, got 0"),
        ({"max_new_tokens": 2.5}, r"at least 1, got 2\.5"),
        ({"max_length": 20}, "max_length is 20, and the prompt alone takes"),
        ({"generation_config": {"max_new_tokens": 3}}, "a GenerationConfig of transformers, got dict"),
    ],
)
@pytest.mark.parametrize("way", WAYS)
def test_odd_values(vlm, ctx, way, options, message):
    with pytest.raises(mf.InputError, match=message):
        said(vlm, ctx, way, **options)


@pytest.mark.parametrize("way", WAYS)
def test_the_caller_s_config_stays_as_it_is_and_nothing_warns(vlm, ctx, way, caplog):
    config = GenerationConfig(max_new_tokens=3, stop_strings=["zebra"])
    before = config.to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said(vlm, ctx, way, generation_config=config)
    assert config.to_dict() == before
    assert not caplog.records


def test_random_numbers_of_the_caller_stay_when_nothing_is_sampled(vlm, ctx):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for way in WAYS:
        said(vlm, ctx, way, max_new_tokens=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stop_string_of_many_tokens():
    """Each of its characters takes four tokens where tokens are bytes."""

    class Bytes:
        def decode(self, ids, skip_special_tokens=False):
            return bytes(ids).decode("utf-8", "replace")

    text = "a long answer before it \N{GRINNING FACE}" + 4 * "\N{WHITE HEAVY CHECK MARK}\N{GRINNING FACE}"
    ids = torch.tensor([[0, *text.encode()]])
    stop = StopStrings(Bytes(), [text[-8:]], length=1)
    assert [bool(stop(ids[:, :n], None)) for n in range(2, ids.shape[1] + 1)] == [False] * (ids.shape[1] - 2) + [True]
