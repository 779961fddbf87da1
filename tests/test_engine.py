"""The engine: contexts made in the batch, places, failures of one, works; without HTTP."""

from __future__ import annotations

import queue
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from waiting import HANG

import mllm_fast as mf
from mllm_fast.core.errors import InputError
from mllm_fast.runtime.sampling import SamplerCache, Sampling
from mllm_fast.serving.engine import Engine
from mllm_fast.serving.requests import (
    BusyError,
    ContextSpec,
    FailureEvent,
    FinishEvent,
    Generation,
    PrefillEvent,
    SideTask,
    StoppingError,
    TokenEvent,
)

PROMPT = "describe this picture"
QUESTION = "what color is the circle ?"


class Asked:
    """A generation, and what became of it."""

    def __init__(self, vlm: mf.VLM, **options):
        self.events: queue.Queue = queue.Queue()
        stop = vlm.settings().end_ids
        self.wanted = Generation(self.events.put, stop, **{"max_tokens": 6, **options})

    def result(self, timeout: float = HANG) -> tuple[list[int], object]:
        ids = []
        while not isinstance(event := self.events.get(timeout=timeout), (FinishEvent, FailureEvent)):
            if isinstance(event, TokenEvent):
                ids.append(event.token)
        while ids[-1:] == [0]:  # padding at the end is no part of an answer
            ids.pop()
        return ids, event


@pytest.fixture
def engine(vlm):
    made = Engine(vlm, max_batch=3, max_queue=8)
    made.start()
    yield made
    made.stop(HANG)


def spec(vlm: mf.VLM, picture, score: str = "generated") -> ContextSpec:
    inputs, (layout,), _ = vlm.prompts.prepare([[picture]], [PROMPT])
    return ContextSpec(inputs, layout, PROMPT, 0.3, score, 6)


def about(vlm: mf.VLM, picture, key: str, question: str = QUESTION, score: str = "generated", **options) -> Asked:
    ids = vlm.prompts.turn_ids(PROMPT, 1, question)
    return Asked(vlm, key=key, spec=spec(vlm, picture, score), ids=ids, **options)


@pytest.mark.parametrize("score", ["generated", "query", "key_norm"])
def test_contexts_made_in_the_batch_answer_as_compressed_ones(vlm, engine, picture, score):
    """Of the three families, in float64; two images described at once, beside whole prompts."""
    red = Image.new("RGB", (24, 64), "red")
    asked = [about(vlm, p, f"{i}", q, score) for i, p in enumerate((picture, red)) for q in (QUESTION, "two")]
    inputs, (layout,), _ = vlm.prompts.prepare([[picture]], [QUESTION])
    asked.append(Asked(vlm, inputs=inputs, layout=layout))
    for one in asked:
        engine.submit(one.wanted)
    got = [one.result() for one in asked]
    for n, p in enumerate((picture, red)):
        try:
            ctx = vlm.compress(p, 0.3, PROMPT, score, max_new_tokens=6)
        except InputError:  # the model says nothing about it, and so does the engine
            assert all(isinstance(one[1].error, InputError) for one in got[2 * n : 2 * n + 2])
            continue
        for i, question in enumerate((QUESTION, "two")):
            assert got[2 * n + i][0] == ctx.ask(question, max_new_tokens=6).token_ids
    assert got[4][0] == vlm.generate(picture, QUESTION, max_new_tokens=6).token_ids
    assert engine.running == engine.waiting == 0


def test_who_waits_for_a_context_pays_once(shapes):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8))
    kept = []
    engine = Engine(shapes, keep_context=lambda key, made: kept.append(key) or made)
    asked = [about(shapes, picture, "one", "what is there?") for _ in range(5)]
    for one in asked:
        engine.scheduler.add(one.wanted)  # all there before it starts
    engine.start()
    began = []
    for one in asked:
        first = one.events.get(timeout=HANG)
        assert isinstance(first, PrefillEvent)
        began.append(first.cached > 0)
        one.result()
    assert kept == ["one"]
    assert sorted(began) == [False, True, True, True, True]
    assert engine.stop(HANG)


def test_what_goes_wrong_with_one_is_told_to_it_alone(vlm, engine, picture, monkeypatch):
    good = about(vlm, picture, "good")
    bad = Asked(vlm, inputs={"input_ids": None}, layout=good.wanted.spec.layout)
    worse = about(vlm, picture, "bad")
    object.__setattr__(worse.wanted.spec, "inputs", {})
    for one in (good, bad, worse):
        engine.submit(one.wanted)
    assert isinstance(good.result()[1], FinishEvent)
    assert isinstance(bad.result()[1], FailureEvent)
    assert isinstance(worse.result()[1], FailureEvent)
    odd = about(vlm, picture, "odd", max_tokens=50)
    engine.submit(odd.wanted)
    while odd.wanted.sampler is None:
        time.sleep(0.001)
    odd.wanted.sampler.processors = [1]  # what chooses its tokens fails, amid the others
    assert isinstance(odd.result()[1], FailureEvent)
    assert engine.running == 0
    with monkeypatch.context() as patch:  # a pass that fails: nobody in it can go on, but the next ones can
        patch.setattr(engine.scheduler.batch, "read", lambda _: 1 / 0)
        other = about(vlm, picture, "other")
        engine.submit(other.wanted)
        assert isinstance(other.result()[1].error, ZeroDivisionError)
    again = about(vlm, picture, "again")
    engine.submit(again.wanted)
    assert isinstance(again.result()[1], FinishEvent)
    assert engine.alive


@pytest.mark.parametrize("poisoned", [0, 3, 7])
def test_a_row_that_cannot_be_read_ends_alone(vlm, picture, monkeypatch, poisoned):
    """The pass fails in its middle, with keys, values and attention masses of the first layer already stored."""
    engine = Engine(vlm, max_batch=9)
    questions = [QUESTION, "two", "red ?", "is the circle blue ?"] * 2
    asked = [about(vlm, picture, str(i), q, "query", max_tokens=5) for i, q in enumerate(questions)]
    told = about(vlm, picture, "told")  # its description is decoded in the same passes
    batch, fails = engine.scheduler.batch, []
    keep, directly = batch._own.keep, batch._read_directly

    def fail():
        rows, row = batch._read, asked[poisoned].wanted.row
        if any(one is row for one in rows) and (fails or len(rows) > 1):
            fails.append(len(rows))
            raise RuntimeError("this row cannot be read")

    def keep_or_fail(layer, *arguments):
        if layer == 1:
            fail()
        return keep(layer, *arguments)

    def read_or_fail(*arguments):
        found = directly(*arguments)
        fail()
        return found

    monkeypatch.setattr(batch._own, "keep", keep_or_fail)
    monkeypatch.setattr(batch, "_read_directly", read_or_fail)
    for one in [*asked, told]:
        engine.scheduler.add(one.wanted)
    engine.start()
    got = [one.result() for one in asked]
    assert isinstance(got[poisoned][1], FailureEvent)
    assert max(fails) > 1
    for i, question in enumerate(questions):
        if i != poisoned:
            ctx = vlm.compress(picture, 0.3, PROMPT, "query", max_new_tokens=6)
            assert got[i][0] == ctx.ask(question, max_new_tokens=5).token_ids
    try:
        wanted = vlm.compress(picture, 0.3, PROMPT, max_new_tokens=6).ask(QUESTION, max_new_tokens=6).token_ids
    except InputError:
        assert isinstance(told.result()[1].error, InputError)
    else:
        assert told.result()[0] == wanted
    assert engine.stop(HANG)


def test_what_fails_at_a_cancellation_ends_those_of_the_batch_alone(vlm, picture, monkeypatch):
    engine = Engine(vlm, max_batch=4)
    engine.start()

    def pieces():
        try:
            while True:
                yield None
        finally:
            raise RuntimeError("while it was closed")

    begun: queue.Queue = queue.Queue()
    task = SideTask(pieces, begun.put)
    engine.submit(task)
    begun.get(timeout=HANG)
    engine.cancel(task)
    long, other = (about(vlm, picture, name, max_tokens=200) for name in ("long", "other"))
    for one in (long, other):
        engine.submit(one.wanted)
    while not (long.wanted.row and other.wanted.row):
        time.sleep(0.001)

    def broken(_):
        raise RuntimeError("the row cannot leave")

    monkeypatch.setattr(engine.scheduler.batch, "leave", broken)
    engine.cancel(long.wanted)
    assert isinstance(other.result()[1], FailureEvent)
    again = about(vlm, picture, "again")
    engine.submit(again.wanted)
    assert isinstance(again.result()[1], FinishEvent)
    assert engine.failure is None
    assert engine.stop(HANG)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_says_so(vlm, picture, monkeypatch):
    engine = Engine(vlm)
    told: queue.Queue = queue.Queue()
    engine.on_failure = told.put
    engine.start()
    monkeypatch.setattr(engine.scheduler, "admit", lambda: 1 / 0)
    asked = about(vlm, picture, "a")
    engine.submit(asked.wanted)
    assert isinstance(asked.result()[1].error, ZeroDivisionError)
    assert told.get(timeout=HANG) is engine.failure
    engine._thread.join(HANG)  # its exception is this test's to ignore
    assert not engine.alive
    with pytest.raises(StoppingError):
        engine.submit(about(vlm, picture, "b").wanted)


def test_samplers_of_many_settings_are_not_all_kept(shapes):
    samplers = SamplerCache(shapes)
    for i in range(200):
        samplers.make([1], Sampling(0.5 + i / 1000, 0.9))
    assert len(samplers._known) == 64
    for cold in (1e-38, 1e-300, 5e-6):
        assert samplers.make([1], Sampling(cold)).plain


def test_a_forgotten_context_is_not_read_again(vlm, engine, picture):
    """Of the same name, but another content: the batch has let go of the first."""
    first, second = (vlm.compress(picture, keep, PROMPT, "key_norm") for keep in (2, 0.9))
    ids = vlm.prompts.turn_ids(PROMPT, 1, QUESTION)

    def ask(ctx) -> list[int]:
        asked = Asked(vlm, key="name", context=ctx, ids=ids)
        engine.submit(asked.wanted)
        return asked.result()[0]

    assert ask(first) == first.ask(QUESTION, max_new_tokens=6).token_ids
    engine.forget("name")
    assert ask(second) == second.ask(QUESTION, max_new_tokens=6).token_ids
    assert "name" in engine.scheduler.batch._prefixes._named
    assert engine.scheduler.batch._prefixes._named["name"].length == second.num_tokens


def test_late_cancelled_and_too_many(vlm, picture):
    engine = Engine(vlm, max_batch=1, max_queue=2)
    late = about(vlm, picture, "late", deadline=time.monotonic() - 1)
    dropped = about(vlm, picture, "dropped", cancelled=True)
    with pytest.raises(StoppingError):
        engine.submit(late.wanted)  # it was not started
    engine.start()
    gate = threading.Event()
    held: queue.Queue = queue.Queue()
    engine.submit(SideTask(lambda: iter([gate.wait(HANG)]), held.put))
    while engine.waiting:
        time.sleep(0.001)
    engine.submit(late.wanted)
    engine.submit(dropped.wanted)
    with pytest.raises(BusyError):
        engine.submit(about(vlm, picture, "more").wanted)
    gate.set()
    assert isinstance(late.result()[1].error, TimeoutError)
    assert held.get(timeout=HANG) is True
    assert isinstance(held.get(timeout=HANG), FinishEvent)
    assert engine.stop(HANG)
    assert dropped.events.empty()
    with pytest.raises(StoppingError):
        engine.submit(about(vlm, picture, "after").wanted)


def test_work_is_done_a_piece_at_a_time(vlm, engine, picture):
    """A long work does not hold an answer up, and what fails in it is told."""
    pieces: queue.Queue = queue.Queue()
    order = []
    submitted, answered = threading.Event(), threading.Event()

    def long():
        for i in range(50):
            if i == 0:
                submitted.wait(HANG)
            if i == 49:
                answered.wait(HANG)
            order.append(i)
            yield i
        raise InputError("enough")

    engine.submit(SideTask(long, pieces.put))
    asked = about(vlm, picture, "one")
    engine.submit(asked.wanted)
    submitted.set()
    asked.result()  # the work is not done yet: it waits for the answer
    assert len(order) < 50
    answered.set()
    found = [pieces.get(timeout=HANG) for _ in range(51)]
    assert found[:50] == list(range(50))
    assert str(found[50].error) == "enough"


def test_processors_of_the_models_own_settings_are_honoured(built):
    """A checkpoint that asks for a repetition penalty gets it in the batch as in `generate`."""
    model, processor = built("llava")
    vlm = mf.VLM(model, processor)
    before = model.generation_config.repetition_penalty
    picture = Image.new("RGB", (32, 32), "blue")
    plain = vlm.generate(picture, QUESTION, max_new_tokens=12).token_ids
    model.generation_config.repetition_penalty = 5.0
    try:
        expected = vlm.generate(picture, QUESTION, max_new_tokens=12).token_ids
        inputs, (layout,), _ = vlm.prompts.prepare([[picture]], [QUESTION])
        asked = Asked(vlm, inputs=inputs, layout=layout, max_tokens=12)
        engine = Engine(vlm)
        engine.start()
        engine.submit(asked.wanted)
        assert asked.result()[0] == expected != plain
        assert engine.stop(HANG)
    finally:
        model.generation_config.repetition_penalty = before


def test_a_seed_is_of_one_answer(shapes):
    logits = torch.randn(56)
    samplers = SamplerCache(shapes)
    drawn = [[samplers.make([1], Sampling(1.0, 0.9, seed)).choose(logits) for _ in range(3)] for seed in range(20)]
    assert all(len(set(same)) == 1 for same in drawn)
    assert len({same[0] for same in drawn}) > 1
    assert samplers.make([1], Sampling()).choose(logits) == int(logits.argmax())


def test_a_context_holds_what_the_page_on_sizes_says(vlm, picture):
    ctx = vlm.compress(picture, 0.3, PROMPT, "key_norm")
    layers, heads, _, width = ctx.keys.shape
    assert ctx.keys.nbytes + ctx.values.nbytes == 2 * layers * heads * width * ctx.keys.itemsize * ctx.num_tokens
