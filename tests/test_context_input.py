"""What a context holds and refuses, and that asking leaves it, and the model, as they were."""

from __future__ import annotations

import threading
from operator import attrgetter

import pytest
import torch
from PIL import Image
from waiting import HANG

import mllm_fast as mf
from mllm_fast.context.compress import prefill_and_score
from mllm_fast.context.figure import draw_kept
from mllm_fast.context.scores import kept_count

PROMPT = "describe this picture"
QUESTIONS = ["what color is the circle ?", "is the circle red ?", "two"]


@pytest.fixture
def ctx(vlm, picture):
    return vlm.compress(picture, keep=0.3, prompt=PROMPT, score="query")


def test_what_it_is_made_of(vlm, picture, ctx):
    _, (layout,), _ = vlm.prompts.prepare([[picture]], [PROMPT])
    image = layout.positions("image")
    count = kept_count(0.3, len(image))
    assert ctx.prefix_length == layout.length
    assert ctx.num_tokens == layout.length - len(image) + count
    assert ctx.nbytes == ctx.keys.nbytes + ctx.values.nbytes + ctx.positions.nbytes
    assert ctx.full_nbytes / (ctx.keys.nbytes + ctx.values.nbytes) == layout.length / ctx.num_tokens
    assert ctx.peak_nbytes >= ctx.full_nbytes + ctx.keys.nbytes
    assert ctx.keys.is_contiguous()
    assert ctx.keys.untyped_storage().nbytes() == ctx.keys.nbytes, "the uncompressed cache is not held"
    boxes = layout.images[0].token_boxes()
    for layer in range(len(vlm.text.layers)):
        kept = ctx.kept(layer)
        assert len(kept.positions) == count
        assert set(kept.positions.tolist()) <= set(image.tolist())
        order = {position: i for i, position in enumerate(image.tolist())}
        assert (kept.boxes == boxes[[order[p] for p in kept.positions.tolist()]]).all()
    assert f"{ctx.num_tokens} of {ctx.prefix_length} tokens" in repr(ctx)


def test_parts(vlm, picture):
    reading = prefill_and_score(vlm, picture, PROMPT, ["query"])
    whole = reading.context(0.3, "query")
    query = reading.context(0.3, "query", "query")
    image = reading.context(0.3, "query", "image")
    text = len(reading.layout.positions("query"))
    assert whole.num_tokens == query.num_tokens + whole.settings["kept"] == image.num_tokens + text
    assert query.settings["kept"] == 0
    assert len(query.kept(0).positions) == 0
    assert torch.equal(whole.kept(1).positions, image.kept(1).positions)


def test_random_follows_its_seed(vlm, picture):
    reading = prefill_and_score(vlm, picture, PROMPT, [])
    one, same, other = (reading.context(0.3, "random", seed=seed).positions for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one[0], one[1]), "layers draw for themselves"


def test_the_highest_mass_is_kept(vlm, picture):
    reading = prefill_and_score(vlm, picture, PROMPT, ["query"])
    ctx = reading.context(4, "query")
    image = reading.layout.positions("image")
    for layer, mass in enumerate(reading.masses["query"]):
        assert set(ctx.kept(layer).positions.tolist()) == set(image[mass[image].topk(4).indices].tolist())


@pytest.mark.parametrize(
    ("keep", "total", "count"),
    [
        (1.0, 7, 7),
        (0.05, 576, 29),
        (0.1, 30, 3),
        (1e-9, 7, 1),
        (0.3, 10, 3),
        (1, 7, 1),
        (7, 7, 7),
        (2 / 3, 3, 2),
        (1e-12, 576, 1),
    ],
)
def test_how_many_are_kept(keep, total, count):
    assert kept_count(keep, total) == count


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.01, float("nan"), float("inf"), 0, -1, 8, True, "0.1", None])
def test_a_share_or_a_count(keep):
    with pytest.raises(mf.InputError, match=r"^keep"):
        kept_count(keep, 7)


def test_asking_changes_nothing(vlm, picture, ctx):
    """Neither the context nor the model, also when it fails in mid-pass."""
    before = [t.clone() for t in (ctx.keys, ctx.values, ctx.positions, ctx.input_ids)]
    state = [attrgetter(name)(vlm.model) for name in vlm.text.findings.state]
    first = ctx.ask(QUESTIONS[0], max_new_tokens=4)
    ctx.ask_many(QUESTIONS, max_new_tokens=3)
    chat = ctx.chat()
    chat.ask(QUESTIONS[1], max_new_tokens=3)
    ctx.explain(QUESTIONS[0], max_new_tokens=3)
    next(ctx.stream(QUESTIONS[0], max_new_tokens=3))

    def fail(*_):
        raise RuntimeError("in mid-pass")

    handle = vlm.text.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in mid-pass"):
        ctx.ask(QUESTIONS[0])
    handle.remove()
    after = (ctx.keys, ctx.values, ctx.positions, ctx.input_ids)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert vlm.text.config._attn_implementation == "sdpa"
    assert [attrgetter(name)(vlm.model) for name in vlm.text.findings.state] == state
    assert ctx.ask(QUESTIONS[0], max_new_tokens=4).token_ids == first.token_ids
    with pytest.raises(AttributeError):
        ctx.position = 0


def test_two_threads_may_ask_at_once(vlm, ctx):
    expected = [ctx.ask(question, max_new_tokens=4).token_ids for question in QUESTIONS]
    said: dict[int, list] = {}

    def ask(i: int) -> None:
        said[i] = [ctx.ask(question, max_new_tokens=4).token_ids for question in QUESTIONS]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert said == dict.fromkeys(range(4), expected)


def test_a_thousand_questions_take_the_memory_of_a_few(built, picture, monkeypatch):
    from mllm_fast.context import questions as module

    vlm = mf.VLM(*built("llava"))
    ctx = vlm.compress(picture, keep=0.3, prompt=PROMPT, score="query")
    sizes, made = [], module.SharedPrefixDecoder
    monkeypatch.setattr(module, "SharedPrefixDecoder", lambda *a: sizes.append(made(*a)) or sizes[-1])
    answers = ctx.ask_many([QUESTIONS[i % 3] for i in range(1000)], max_new_tokens=1)
    assert len(answers) == 1000
    assert len(sizes) == 32
    assert max(len(session._next) for session in sizes) == 32
    assert answers[3].token_ids == answers[0].token_ids


BAD = [
    (lambda c: c.ask(""), "the question is empty"),
    (lambda c: c.ask_many([]), "no question was given"),
    (lambda c: c.ask_many("what"), "takes a list of questions"),
    (lambda c: c.ask_many(["two"], batch_size=0), "batch_size is at least 1"),
    (lambda c: c.ask("two", max_new_tokens=0), "max_new_tokens is at least 1"),
    (lambda c: c.ask("two " * 600), "the model's window is 512"),
    (lambda c: c.ask("two", max_new_tokens=512), "the model's window is 512"),
    (lambda c: c.ask("two", num_beams=3), "follows one sequence, got num_beams=3"),
    (lambda c: c.ask("two", guidance_scale=2.0), "takes no guidance_scale"),
    (lambda c: c.ask("two", prompt_lookup_num_tokens=2), "takes no prompt_lookup_num_tokens"),
    (lambda c: c.vlm.compress(c.images[0], prompt=PROMPT, num_beams=3), "compress follows one sequence"),
    (lambda c: c.ask("\ud800"), "not valid Unicode"),
    (lambda c: c.kept(9), "layers are 0 to 2, got 9"),
    (lambda c: c.explain("two", ""), "the answer to be explained is empty"),
    (lambda c: c.explain("two", "red", do_sample=True), "nothing is generated"),
    (lambda c: c.explain("two", final_norm="both"), "final_norm is 'frozen' or 'own'"),
    (lambda c: c.explain("two", "red").verify(), "keep too little to run the model again"),
    (lambda c: c.stream("two", final_norm="both"), "final_norm is 'frozen' or 'own'"),
    (lambda c: c.stream("two", num_return_sequences=2), "follows one sequence"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input_is_named(built, picture, call, message):
    vlm = mf.VLM(*built("llava"))
    with pytest.raises(mf.InputError, match=message):
        call(vlm.compress(picture, keep=0.3, prompt=PROMPT, score="query"))


def test_what_cannot_be_compressed(built, picture):
    vlm = mf.VLM(*built("internvl"))
    for options, message in (
        ({"score": "best"}, "score is one of"),
        ({"parts": "all"}, "parts is one of"),
        ({"keep": 0.0}, "above 0"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"score": "generated", "max_new_tokens": 1}, "no token of a reply to .* was read"),
    ):
        with pytest.raises(mf.InputError, match=message):
            vlm.compress(picture, **{"prompt": PROMPT, **options})


def test_the_drawing_has_a_picture_a_layer(vlm, picture):
    ctx = vlm.compress([picture, Image.new("RGB", (24, 64), "red")], keep=0.3, prompt=PROMPT, score="query")
    drawn = draw_kept(ctx)
    assert drawn.width > 600
    assert drawn.height > 200
