"""Prompts that are read word for word: what the images take is read once, and kept for other questions about them."""

from __future__ import annotations

import asyncio
import threading

import families
import numpy as np
import pytest
from PIL import Image
from served import data_url

import mllm_fast as mf
from mllm_fast.serving.errors import ServiceError
from mllm_fast.serving.messages import conversation
from mllm_fast.serving.requests import ContextSpec, FinishEvent, Generation, PrefillEvent
from mllm_fast.serving.scheduler import Scheduler
from mllm_fast.serving.schema import ChatRequest
from mllm_fast.serving.service import Service
from mllm_fast.serving.settings import Settings
from mllm_fast.shapes.scenes import generate_scene

QUESTIONS = ("What color is the star?", "How many objects are there?", "Describe the image.")


def turn(text, *pictures):
    parts = [{"type": "image_url", "image_url": {"url": data_url(one)}} for one in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


async def answered(service, messages, tenant="", keep="off", **options):
    """The text of an answer, its usage, and what is told of a context."""
    request = ChatRequest.model_validate({"model": service.name, "messages": messages, "keep": keep, **options})
    chunks = [chunk async for chunk in await service.chat(request, tenant)]
    return "".join(one.text for one in chunks), chunks[-1].usage, chunks[-1].context


def run(vlm, play, **settings):
    async def all_of_it():
        service = Service(vlm, Settings(**settings))
        await service.start()
        try:
            return await play(service)
        finally:
            service.stop()

    return asyncio.run(all_of_it())


@pytest.fixture
def scene():
    return generate_scene(np.random.default_rng(3)).image


def test_the_images_are_read_once(shapes, scene, monkeypatch):
    read = []
    inputs = type(shapes.prompts)._inputs
    monkeypatch.setattr(type(shapes.prompts), "_inputs", lambda *given: read.append(1) or inputs(*given))
    expected = [shapes.generate(scene, text).text for text in QUESTIONS]
    read.clear()

    async def play(service):
        found = [await answered(service, [turn(text, scene)]) for text in QUESTIONS]
        again = await answered(service, [turn(QUESTIONS[0], scene)], tenant="other")
        listed = await service.contexts()
        with pytest.raises(ServiceError, match="no context"):
            await service.context(f"ctx-{next(iter(service.store._held))}")
        return found, again, listed

    found, again, listed = run(shapes, play)
    assert len(read) == 2  # the first question, and that of the other tenant, who is told nothing
    assert [text for text, _, _ in found] == expected
    assert all(context is None for _, _, context in found)
    cached = [usage.prompt_tokens_details.cached_tokens for _, usage, _ in found]
    layout = shapes.prompts.prepare([[scene]], [QUESTIONS[0]])[1][0]
    end = int(layout.images[0].positions[-1]) + 1
    assert cached == [0, end, end]
    assert found[0][1].prompt_tokens == layout.length
    assert again[1].prompt_tokens_details.cached_tokens == 0
    assert listed == []


def test_many_at_once_wait_for_one_reading(shapes, scene):
    expected = [shapes.generate(scene, text).text for text in QUESTIONS * 4]

    async def play(service):
        asked = [answered(service, [turn(text, scene)]) for text in QUESTIONS * 4]
        found = await asyncio.gather(*asked)
        return [text for text, _, _ in found], service.store.misses

    assert run(shapes, play) == (expected, 1)


def test_turns_before_and_between_images_are_part_of_it(shapes, scene):
    other = generate_scene(np.random.default_rng(4)).image
    talk = [turn("What is this?", scene), {"role": "assistant", "content": "a star"}]
    first, second = [*talk, turn("And this?", other)], [*talk, turn("Is it red?", other)]
    changed = [turn("How many objects are there?", scene), *second[1:]]

    def whole(messages):
        turns = conversation(ChatRequest.model_validate({"messages": messages}).messages, Settings()).turns
        inputs, layout = shapes.prompts.conversation([scene, other], turns)
        sequence = shapes.run(inputs, shapes.settings(64), do_sample=False)[0, layout.length :]
        return shapes.processor.tokenizer.decode(sequence, skip_special_tokens=True).strip()

    async def play(service):
        return [await answered(service, messages, max_tokens=64) for messages in (first, second, changed)]

    found = run(shapes, play)
    assert [text for text, _, _ in found] == [whole(messages) for messages in (first, second, changed)]
    cached = [usage.prompt_tokens_details.cached_tokens for _, usage, _ in found]
    assert cached[0] == cached[2] == 0 < cached[1]  # other words before the last image are another prefix


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "divides"), [("qwen2_vl", True), ("paligemma", False)])
def test_a_model_whose_images_see_the_question_is_read_whole(name, divides):
    model, processor = families.build(name)
    vlm = mf.VLM(model.float().eval(), processor)
    picture = Image.fromarray(np.random.default_rng(7).integers(0, 256, (40, 90, 3), dtype=np.uint8))
    questions = ["what color is the circle ?", "is there a square ?", "red or blue ?"]
    expected = [vlm.generate(picture, text, max_new_tokens=8).text for text in questions]

    async def play(service):
        return [await answered(service, [turn(text, picture)], max_tokens=8) for text in questions]

    found = run(vlm, play)
    assert [text.strip() for text, _, _ in found] == expected
    assert [usage.prompt_tokens_details.cached_tokens > 0 for _, usage, _ in found] == [False, divides, divides]


def test_marks_in_a_question_stay_text(shapes, scene):
    question = "Is <image> a star?"
    expected = shapes.generate(scene, question).text

    async def play(service):
        return [await answered(service, [turn(question, scene)]) for _ in range(2)]

    found = run(shapes, play)
    assert [text for text, _, _ in found] == [expected] * 2
    assert found[1][1].prompt_tokens_details.cached_tokens > 0


def test_memory_is_the_stores(shapes, scene):
    async def play(service):
        return [(await answered(service, [turn(text, scene)]))[1] for text in QUESTIONS[:2]], service.store.nbytes

    usages, nbytes = run(shapes, play, memory_bytes=1000)
    assert [one.prompt_tokens_details.cached_tokens for one in usages] == [0, 0]
    assert nbytes == 0


def test_the_first_answer_may_come_from_the_whole_picture(shapes, scene):
    whole, context = shapes.compress(scene, 1.0), shapes.compress(scene)

    async def play(service):
        first = await answered(service, [turn(QUESTIONS[0], scene)], keep=None)
        # at once, while the context may still be being made
        again = await answered(service, [turn(QUESTIONS[1])], keep=None, context=first[2].id)
        info = await service.context(first[2].id)
        later = await answered(service, [turn(QUESTIONS[2], scene)], keep=None)
        await service.delete(first[2].id)
        return first, again, info, later, await service.contexts()

    first, again, info, later, left = run(shapes, play, first_answer="whole")
    assert first[0] == whole.ask(QUESTIONS[0]).text
    assert again[0] == context.ask(QUESTIONS[1]).text
    assert later[0] == context.ask(QUESTIONS[2]).text
    assert first[1].prompt_tokens_details.cached_tokens == 0
    assert later[1].prompt_tokens_details.cached_tokens == context.prefix_length
    told = ("id", "tokens", "prefix_tokens", "bytes", "uncompressed_bytes")
    assert [getattr(first[2], name) for name in told] == [getattr(info, name) for name in told]
    assert left == []


def test_whoever_asks_while_a_context_is_made_is_answered_before_it(shapes, scene):
    """Step by step, without the engine's thread: the answers end while the description still goes on."""
    inputs, (layout,), _ = shapes.prompts.prepare([[scene]], [QUESTIONS[2]])
    spec = ContextSpec(inputs, layout, QUESTIONS[2], 0.05, "generated", 64)
    made: dict = {}
    keep = lambda key, context: made.setdefault(key, context)  # noqa: E731
    scheduler = Scheduler(shapes, 8, threading.Condition(), keep, made.get, at_once=True)
    events: dict[str, list] = {}

    def ask(question, max_tokens=1):
        events[question] = []
        ids = shapes.prompts.turn_ids(QUESTIONS[2], 1, question)
        scheduler.add(
            Generation(events[question].append, shapes.settings().end_ids, max_tokens, key="k", spec=spec, ids=ids)
        )

    def step():
        scheduler.admit()
        scheduler.run_pass()

    ask(QUESTIONS[0])
    ask("only the context", 0)
    step()  # which finds that there is no context
    step()
    assert isinstance(events[QUESTIONS[0]][-1], FinishEvent)
    ask(QUESTIONS[1])
    step()
    assert isinstance(events[QUESTIONS[1]][-1], FinishEvent)
    assert events[QUESTIONS[1]][0].cached == layout.length
    assert scheduler.builders.announced("k")
    assert not made
    assert events["only the context"] == []
    for _ in range(64):
        step()
    assert made["k"].description == shapes.compress(scene).description
    assert made["k"].positions.equal(shapes.compress(scene).positions)
    assert [type(one) for one in events["only the context"]] == [PrefillEvent, FinishEvent]
    assert not scheduler.busy


def test_a_context_that_keeps_everything_needs_no_description(shapes, scene):
    async def play(service):
        answer = await answered(service, [turn(QUESTIONS[0], scene)], keep=1.0)
        return answer, service.engine.scheduler.tokens

    (text, usage, info), tokens = run(shapes, play)
    assert text == shapes.compress(scene, 1.0).ask(QUESTIONS[0]).text
    assert info.tokens == info.prefix_tokens
    assert tokens == usage.completion_tokens + 1  # and the end
