"""Equivalences 5 and 6: a compressed context computes what the whole sequence computes with the dropped tokens masked,
layer by layer, and many questions at once are each question alone. In float64 on random models of the three families,
against their own eager attention, so that the tolerance (1e-9 on logits of order 1 to 10) is rounding alone."""

from __future__ import annotations

from dataclasses import replace

import knocked
import pytest
import tiny
import torch
from knocked import dropped
from PIL import Image

import mllm_fast as mf
from mllm_fast.context.compress import prefill_and_score
from mllm_fast.context.scores import AttendedTokens
from mllm_fast.runtime.hooks import recording
from mllm_fast.runtime.kv_cache import cache_of
from mllm_fast.runtime.shared_prefix import SharedPrefixDecoder
from mllm_fast.runtime.trace import make_trace

PROMPT = "describe this picture"
QUESTIONS = ["what color is the circle ?", "two", "is the circle red , green ?"]
RED = Image.new("RGB", (24, 64), "red")
WAYS = [
    {"keep": 0.3},
    {"keep": 0.3, "score": "query"},
    {"keep": 5, "score": "key_norm"},
    {"keep": 0.5, "score": "random"},
    {"keep": 0.3, "parts": "image"},
    {"keep": 0.3, "parts": "query"},
    {"keep": 1.0},
]
WORDS = {"max_new_tokens": 4}


def masked_logits(vlm: mf.VLM, ctx: mf.Context, more: list[int], pictures: list) -> torch.Tensor:
    """Logits of the rows after the prefix, by eager attention over everything with the dropped tokens masked."""
    with torch.no_grad(), knocked.eager(vlm, dropped(ctx), [ctx.layout]):
        return vlm.model(**knocked.whole(vlm, pictures, PROMPT, more)).logits[0, ctx.prefix_length :]


def turn(vlm: mf.VLM, question: str, images: int = 1) -> list[int]:
    return vlm.prompts.turn_ids(PROMPT, images, question)


def stepwise(vlm: mf.VLM, ctx: mf.Context, ids: list[int], first: int) -> torch.Tensor:
    """Logits of the rows from `first` - 1 on: a question's tokens at once, then one token a pass."""
    session = SharedPrefixDecoder(vlm.text, ctx.keys, ctx.values, ctx.position, 1, vlm.backend)
    with session.recording(), torch.no_grad():
        rows = [session.read([ids[:first]])[0]] + [session.read([[token]])[0] for token in ids[first:]]
    return torch.stack(rows)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_is_the_whole_sequence_with_the_dropped_tokens_masked(vlm, picture, way):
    ctx = vlm.compress(picture, prompt=PROMPT, **WORDS, **way)
    ids = turn(vlm, QUESTIONS[0]) + turn(vlm, QUESTIONS[1])
    expected = masked_logits(vlm, ctx, ids, [picture])
    torch.testing.assert_close(stepwise(vlm, ctx, ids, 6), expected[5:], rtol=0, atol=1e-9)
    if way["keep"] != 1.0:  # what was dropped mattered
        open_to_all = vlm.compress(picture, keep=1.0, prompt=PROMPT, **WORDS)
        assert (masked_logits(vlm, open_to_all, ids, [picture]) - expected).abs().max() > 1e-3


def test_several_pictures(vlm, picture):
    ctx = vlm.compress([picture, RED], keep=0.4, prompt=PROMPT, score="query")
    ids = turn(vlm, QUESTIONS[0], 2)
    expected = masked_logits(vlm, ctx, ids, [picture, RED])
    torch.testing.assert_close(stepwise(vlm, ctx, ids, 3), expected[2:], rtol=0, atol=1e-9)
    kept = ctx.kept(1)
    assert set(kept.images.tolist()) == {0, 1}
    assert len(kept.positions) == ctx.settings["kept"]


def test_many_questions_are_each_alone(vlm, picture):
    """Of different lengths, while some end: the same logits as one by one."""
    ctx = vlm.compress(picture, keep=0.3, prompt=PROMPT, **WORDS)
    ids = [turn(vlm, question) for question in QUESTIONS]
    then = [[5, 7, 9], [11, 8, 6], [9, 9, 10]]
    alone = [stepwise(vlm, ctx, a + b, len(a)) for a, b in zip(ids, then, strict=True)]
    session = SharedPrefixDecoder(vlm.text, ctx.keys, ctx.values, ctx.position, 3, vlm.backend)
    with session.recording(), torch.no_grad():
        torch.testing.assert_close(session.read(ids), torch.stack([a[0] for a in alone]), rtol=0, atol=1e-12)
        second = session.read([[b[0]] for b in then])
        torch.testing.assert_close(second, torch.stack([a[1] for a in alone]), rtol=0, atol=1e-12)
        session.keep(torch.tensor([0, 2]))
        third = session.read([[then[0][1]], [then[2][1]]])
        torch.testing.assert_close(third, torch.stack([alone[0][2], alone[2][2]]), rtol=0, atol=1e-12)


OPTIONS = {
    "plain": {},
    "processors": {"repetition_penalty": 1.3, "min_new_tokens": 3},
    "a penalty on what pads": {"repetition_penalty": 1.3, "pad_token_id": 9},
    "a filler that is a word": {"eos_token_id": [2, *range(9, 20)], "pad_token_id": 7},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_answers_in_one_batch_are_those_alone(vlm, picture, options):
    ctx = vlm.compress(picture, keep=0.3, prompt=PROMPT, **WORDS)
    together = ctx.ask_many(QUESTIONS, max_new_tokens=5, **options)
    chunked = ctx.ask_many(QUESTIONS, max_new_tokens=5, batch_size=2, **options)
    for question, many, few in zip(QUESTIONS, together, chunked, strict=True):
        one = ctx.ask(question, max_new_tokens=5, **options)
        assert one.token_ids == many.token_ids == few.token_ids
        assert torch.equal(one.input_ids, many.input_ids)
        assert one.layout.prompt_length == ctx.prefix_length + len(turn(vlm, question))


def test_keeping_everything_is_the_uncompressed_cache(vlm, picture):
    """transformers' own generation from the image, the prompt and the question, the reply left out."""
    ctx = vlm.compress(picture, keep=1.0, prompt=PROMPT, **WORDS)
    assert ctx.num_tokens == ctx.prefix_length
    for question in QUESTIONS:
        inputs = knocked.whole(vlm, [picture], PROMPT, turn(vlm, question))
        with torch.no_grad():
            out = vlm.model.generate(**inputs, max_new_tokens=6, do_sample=False)[0]
        said = ctx.ask(question, max_new_tokens=6)
        assert out.tolist()[: len(said.input_ids)] == said.input_ids.tolist()


def test_sampling_follows_the_seed(vlm, picture):
    ctx = vlm.compress(picture, keep=0.3, prompt=PROMPT, **WORDS)
    options = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 6}
    said = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        said.append([a.token_ids for a in ctx.ask_many(QUESTIONS, **options)])
    assert said[0] == said[1] != said[2]


def test_a_chat_sees_what_was_said(vlm, picture):
    """Each turn continues what transformers would have generated from the whole conversation."""
    ctx = vlm.compress(picture, keep=1.0, prompt=PROMPT, **WORDS)
    chat = ctx.chat()
    for i, question in enumerate(QUESTIONS):
        before = chat.turns[-1].input_ids[ctx.prefix_length :].tolist() if i else []
        more = before + turn(vlm, question)
        answer = chat.ask(question, max_new_tokens=3)
        with torch.no_grad():
            out = vlm.model.generate(**knocked.whole(vlm, [picture], PROMPT, more), max_new_tokens=3, do_sample=False)[
                0
            ]
        assert out.tolist()[: len(answer.input_ids)] == answer.input_ids.tolist()
    assert len(chat.turns) == 3
    assert ctx.ask(QUESTIONS[1], max_new_tokens=3).token_ids  # the context itself knows nothing of the chat


def test_a_chat_forgets_what_went_wrong(vlm, picture):
    ctx = vlm.compress(picture, keep=0.3, prompt=PROMPT, **WORDS)
    chats = ctx.chat(), ctx.chat()

    class Stop(Exception):  # noqa: N818
        pass

    def stop(*_):
        raise Stop

    for chat in chats:
        chat.ask(QUESTIONS[0], max_new_tokens=2)
    handle = vlm.text.layers[1].mlp.register_forward_hook(stop)
    try:
        with pytest.raises(Stop):
            chats[1].ask(QUESTIONS[2], max_new_tokens=2)
    finally:
        handle.remove()
    after = [chat.ask(QUESTIONS[1], max_new_tokens=4).token_ids for chat in chats]
    assert after[0] == after[1]


def test_explains_what_is_kept(vlm, picture):
    """The scores of the whole sequence with the dropped tokens masked; dropped tokens have none."""
    ctx = vlm.compress(picture, keep=0.3, prompt=PROMPT, **WORDS)
    ex = ctx.explain(QUESTIONS[0], "red green two")
    more = turn(vlm, QUESTIONS[0]) + ex.token_ids
    layout = mf.TokenLayout(len(ex.input_ids), ex.layout.prompt_length, ctx.layout.images)
    plan = vlm.plan([rule.knockout for rule in dropped(ctx)], [layout])
    with torch.no_grad(), recording(vlm.text, 3, plan) as record:
        output = vlm.model(**knocked.whole(vlm, [picture], PROMPT, more[:-1]), use_cache=True)
    masked = ctx.explain(QUESTIONS[0], "red green two")
    masked.trace = make_trace(vlm.text, record, cache_of(output), 3, ex.layout.prompt_length)
    torch.testing.assert_close(ex.head_scores, masked.head_scores, rtol=1e-6, atol=1e-7)
    for token in range(3):
        torch.testing.assert_close(ex.attention(token), masked.attention(token), rtol=1e-6, atol=1e-7)
        scores, expected = (e.position_scores(token, "all") for e in (ex, masked))
        torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-7)
        heads = vlm.text.num_heads
        for layer, positions in enumerate(ctx.positions):
            gone = torch.ones(ctx.prefix_length, dtype=torch.bool).index_fill(0, positions, False)
            assert (scores[layer * heads : (layer + 1) * heads, : ctx.prefix_length][:, gone] == 0).all()
        assert ex.heatmap(token).abs().max() > 0
    assert ex.images == list(ctx.images)


def test_streams_and_explains_each_step(vlm, picture):
    ctx = vlm.compress(picture, keep=0.3, prompt=PROMPT, **WORDS)
    said = ctx.ask(QUESTIONS[0], max_new_tokens=5)
    ex = ctx.explain(QUESTIONS[0], max_new_tokens=5)
    stream = ctx.stream(QUESTIONS[0], explain=True, max_new_tokens=5)
    steps = []
    for step in stream:
        ctx.ask(QUESTIONS[1], max_new_tokens=2)  # what comes between changes nothing
        steps.append(step)
    assert [step.token_id for step in steps] == said.token_ids == ex.token_ids
    assert stream.answer.text == said.text
    for i, step in enumerate(steps):
        torch.testing.assert_close(step.head_scores, ex.head_scores[i], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(step.heatmap(heads="all"), ex.heatmap(i, heads="all"), rtol=1e-6, atol=1e-7)
    with pytest.raises(mf.InputError, match="take no knockouts"):
        stream.knockout = mf.Knockout("image", "generated")


def test_long_answers_get_more_room(built, picture):
    """More tokens than the room that is made at once."""
    vlm = mf.VLM(*built("internvl"))
    ctx = vlm.compress(picture, keep=0.3, prompt=PROMPT, **WORDS)
    ids = turn(vlm, QUESTIONS[0]) + [9 + i % 7 for i in range(45)]
    expected = masked_logits(vlm, ctx, ids, [picture])
    torch.testing.assert_close(stepwise(vlm, ctx, ids, 6), expected[5:], rtol=0, atol=1e-9)


def test_small_keys_draw_attention(vlm, picture):
    """The score "key_norm" keeps the tokens whose keys are shortest, a mean over heads."""
    reading = prefill_and_score(vlm, picture, PROMPT, [])
    image = reading.layout.positions("image")
    ctx = reading.context(4, "key_norm")
    for layer, keys in enumerate(reading.keys):
        shortest = keys.norm(dim=-1).mean(0)[image].topk(4, largest=False).indices
        assert set(ctx.kept(layer).positions.tolist()) == set(image[shortest].tolist())


@pytest.mark.parametrize("score", ["query", "generated"])
def test_mass_is_the_mean_of_eager_attention(vlm, picture, score):
    """Over heads, and over the prompt's rows after the image or the rows of what was said."""
    reading = prefill_and_score(vlm, picture, PROMPT, [score], max_new_tokens=5)
    said = vlm.generate(picture, PROMPT, max_new_tokens=5)
    inputs = knocked.whole(vlm, [picture], PROMPT, said.token_ids)
    with torch.no_grad(), tiny.eager(vlm.model):
        attentions = vlm.model(**inputs, output_attentions=True).attentions
    rows = said.layout.positions("query" if score == "query" else "generated")
    if score == "generated":
        rows = rows[: len(said.token_ids) - (len(said.token_ids) == 5)]  # the last one, cut off by length, is not read
    expected = torch.stack([a[0][:, rows, : reading.layout.length].mean((0, 1)) for a in attentions]).float()
    torch.testing.assert_close(reading.masses[score], expected, rtol=1e-5, atol=1e-7)


def test_scores_take_part_in_no_more_than_they_say(vlm, picture):
    """A prefill gives the query's rows, decoding the generated ones."""
    _, (layout,), _ = vlm.prompts.prepare([[picture]], [PROMPT])
    query, generated = (AttendedTokens(layout, score, 3) for score in ("query", "generated"))
    chosen = query.wants(0, layout.length)
    assert chosen[0].nonzero()[:, 0].tolist() == layout.positions("query").tolist()
    assert query.wants(layout.length, 1) is False
    assert generated.wants(0, layout.length) is False
    assert generated.wants(layout.length, 1) is True
    assert generated.mean() is None


def test_a_turn_that_ended_is_closed_by_the_template(shapes, picture):
    """The tokens of a conversation are the template's: no end of turn is missing or doubled."""
    ctx = shapes.compress(picture, keep=1.0, score="query")
    chat, asked = ctx.chat(), ["how many objects are there?", "what color is the star?"]
    for question in asked:
        chat.ask(question)
    turns = [shapes.prompts.turn_ids(ctx.prompt, 1, question) for question in asked]
    assert len(chat.turns[0].token_ids) == 1, "ended, not cut off"
    expected = [*ctx.input_ids.tolist(), *turns[0], *chat.turns[0].token_ids, *turns[1]]
    assert chat.turns[1].input_ids[: chat.turns[1].layout.prompt_length].tolist() == expected


def test_a_description_goes_on_from_what_is_kept(vlm, picture, tmp_path):
    """From everything it is the model's own; from the query alone that with the image closed to the answer."""
    prompt, count = "describe this picture", 6
    own = vlm.generate(picture, prompt, max_new_tokens=count)
    whole = vlm.compress(picture, keep=1.0, prompt=prompt, max_new_tokens=3)
    assert whole.describe(max_new_tokens=count).token_ids == own.token_ids
    assert torch.equal(whole.describe(max_new_tokens=count).input_ids, own.input_ids)
    assert whole.describe(max_new_tokens=1).token_ids == own.token_ids[:1]
    blind = vlm.generate(picture, prompt, knockout=mf.Knockout("image", "generated"), max_new_tokens=count)
    query = vlm.compress(picture, prompt=prompt, parts="query", score="query")
    assert query.describe(max_new_tokens=count).token_ids == blind.token_ids
    few = vlm.compress(picture, keep=0.3, prompt=prompt)
    dropped = [
        mf.Knockout(
            tuple(i for i in few.layout.positions("image").tolist() if i not in kept.positions), "generated", (n,)
        )
        for n, kept in enumerate(map(few.kept, range(len(vlm.text.layers))))
    ]
    out = vlm.generate(picture, prompt, knockout=dropped, max_new_tokens=count)
    assert few.describe(max_new_tokens=count).token_ids == out.token_ids
    few.save(tmp_path / "few.safetensors")
    loaded = mf.Context.load(tmp_path / "few.safetensors", vlm)
    assert loaded.describe(max_new_tokens=count).token_ids == out.token_ids
    with pytest.raises(mf.InputError, match="does not hold the first token"):
        replace(loaded, first_token=None).describe()
