"""The server's parts without HTTP: the engine's thread, tokens to text, messages, keys, remote pictures."""

from __future__ import annotations

import asyncio
import queue
import socket
import threading
import time

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import mllm_fast as mf
from mllm_fast.errors import InputError
from mllm_fast.serving import pictures
from mllm_fast.serving.connections import Connections
from mllm_fast.serving.conversation import conversation
from mllm_fast.serving.engine import Engine
from mllm_fast.serving.errors import ServiceError, service_error
from mllm_fast.serving.guard import Guard
from mllm_fast.serving.jobs import Began, BusyError, Failed, Finished, Generation, Said, StoppingError, Work
from mllm_fast.serving.keys import Keys
from mllm_fast.serving.logs import Log
from mllm_fast.serving.making import Recipe
from mllm_fast.serving.metrics import Metrics
from mllm_fast.serving.sampling import Choosers, Sampling
from mllm_fast.serving.schema import Message
from mllm_fast.serving.settings import Settings
from mllm_fast.serving.words import Words

PROMPT = "describe this picture"
QUESTION = "what color is the circle ?"


class Asked:
    """A generation, and what became of it."""

    def __init__(self, vlm: mf.VLM, **options):
        self.events: queue.Queue = queue.Queue()
        stop = vlm.prompts.end_ids()
        self.wanted = Generation(self.events.put, stop, **{"max_tokens": 6, **options})

    def result(self, timeout: float = 30) -> tuple[list[int], object]:
        ids = []
        while not isinstance(event := self.events.get(timeout=timeout), (Finished, Failed)):
            if isinstance(event, Said):
                ids.append(event.token)
        while ids[-1:] == [0]:  # padding at the end is no part of an answer
            ids.pop()
        return ids, event


@pytest.fixture
def engine(vlm):
    made = Engine(vlm, max_batch=3, max_queue=8)
    made.start()
    yield made
    made.stop(30)


def recipe(vlm: mf.VLM, picture, score: str = "generated") -> Recipe:
    inputs, (layout,), _ = vlm.prompts.prepare([[picture]], [PROMPT])
    return Recipe(inputs, layout, PROMPT, 0.3, score, 6)


def about(vlm: mf.VLM, picture, key: str, question: str = QUESTION, score: str = "generated", **options) -> Asked:
    ids = vlm.prompts.turn_ids(PROMPT, 1, question)
    return Asked(vlm, key=key, recipe=recipe(vlm, picture, score), ids=ids, **options)


@pytest.mark.parametrize("score", ["generated", "query", "norm"])
def test_contexts_made_in_the_batch_answer_as_compressed_ones(vlm, engine, picture, score):
    """Of the three families, in float64; two pictures described at once, beside whole prompts."""
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
        engine._queue.append(one.wanted)  # all there before it starts
    engine.start()
    began = []
    for one in asked:
        first = one.events.get(timeout=30)
        assert isinstance(first, Began)
        began.append(first.cached > 0)
        one.result()
    assert kept == ["one"]
    assert sorted(began) == [False, True, True, True, True]
    assert engine.stop(10)


def test_what_goes_wrong_with_one_is_told_to_it_alone(vlm, engine, picture, monkeypatch):
    good = about(vlm, picture, "good")
    bad = Asked(vlm, inputs={"input_ids": None}, layout=good.wanted.recipe.layout)
    worse = about(vlm, picture, "bad")
    object.__setattr__(worse.wanted.recipe, "inputs", {})
    for one in (good, bad, worse):
        engine.submit(one.wanted)
    assert isinstance(good.result()[1], Finished)
    assert isinstance(bad.result()[1], Failed)
    assert isinstance(worse.result()[1], Failed)
    odd = about(vlm, picture, "odd", max_tokens=50)
    engine.submit(odd.wanted)
    while odd.wanted.chooser is None:
        time.sleep(0.001)
    odd.wanted.chooser.processors = [1]  # what chooses its tokens fails, amid the others
    assert isinstance(odd.result()[1], Failed)
    assert engine.running == 0
    with monkeypatch.context() as patch:  # a pass that fails: nobody in it can go on, but the next ones can
        patch.setattr(engine._batch, "read", lambda: 1 / 0)
        other = about(vlm, picture, "other")
        engine.submit(other.wanted)
        assert isinstance(other.result()[1].error, ZeroDivisionError)
    again = about(vlm, picture, "again")
    engine.submit(again.wanted)
    assert isinstance(again.result()[1], Finished)
    assert engine.alive


def test_a_forgotten_context_is_not_read_again(vlm, engine, picture):
    """Of the same name, but another content: the batch has let go of the first."""
    first, second = (vlm.compress(picture, keep, PROMPT, "norm") for keep in (2, 0.9))
    ids = vlm.prompts.turn_ids(PROMPT, 1, QUESTION)

    def ask(ctx) -> list[int]:
        asked = Asked(vlm, key="name", context=ctx, ids=ids)
        engine.submit(asked.wanted)
        return asked.result()[0]

    assert ask(first) == first.ask(QUESTION, max_new_tokens=6).token_ids
    engine.forget("name")
    assert ask(second) == second.ask(QUESTION, max_new_tokens=6).token_ids
    assert "name" in engine._batch._prefixes._named
    assert engine._batch._prefixes._named["name"].length == second.num_tokens


def test_late_cancelled_and_too_many(vlm, picture):
    engine = Engine(vlm, max_batch=1, max_queue=2)
    late = about(vlm, picture, "late", deadline=time.monotonic() - 1)
    dropped = about(vlm, picture, "dropped", cancelled=True)
    with pytest.raises(StoppingError):
        engine.submit(late.wanted)  # it was not started
    engine.start()
    gate = threading.Event()
    held: queue.Queue = queue.Queue()
    engine.submit(Work(lambda: iter([gate.wait(30)]), held.put))
    while engine.waiting:
        time.sleep(0.001)
    engine.submit(late.wanted)
    engine.submit(dropped.wanted)
    with pytest.raises(BusyError):
        engine.submit(about(vlm, picture, "more").wanted)
    gate.set()
    assert isinstance(late.result()[1].error, TimeoutError)
    assert held.get(timeout=10) is True
    assert isinstance(held.get(timeout=10), Finished)
    assert engine.stop(10)
    assert dropped.events.empty()
    with pytest.raises(StoppingError):
        engine.submit(about(vlm, picture, "after").wanted)


def test_work_is_done_a_piece_at_a_time(vlm, engine, picture):
    """A long work does not hold an answer up, and what fails in it is told."""
    pieces: queue.Queue = queue.Queue()
    order = []

    def long():
        for i in range(50):
            time.sleep(0.01)
            order.append(i)
            yield i
        raise InputError("enough")

    engine.submit(Work(long, pieces.put))
    asked = about(vlm, picture, "one")
    engine.submit(asked.wanted)
    asked.result()
    assert len(order) < 50
    found = [pieces.get(timeout=30) for _ in range(51)]
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
        assert engine.stop(10)
    finally:
        model.generation_config.repetition_penalty = before


def test_a_seed_is_of_one_answer(shapes):
    import torch

    logits = torch.randn(56)
    choosers = Choosers(shapes)
    drawn = [[choosers.make([1], Sampling(1.0, 0.9, seed)).choose(logits) for _ in range(3)] for seed in range(20)]
    assert all(len(set(same)) == 1 for same in drawn)
    assert len({same[0] for same in drawn}) > 1
    assert choosers.make([1], Sampling()).choose(logits) == int(logits.argmax())


class Letters:
    """A tokenizer of single bytes: characters of several tokens, and spaces that hang on what stands before."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return bytes(one for one in ids if one or not skip_special_tokens).decode("utf-8", "replace")


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="ab \nä€😀", max_size=30), stop=st.lists(st.text(alphabet="ab ä", max_size=4), max_size=3))
def test_words_come_whole_and_stop_in_time(text, stop):
    words = Words(Letters(), stop)
    sent = []
    for token in text.encode():
        sent.append(words.push(token))
        if words.stopped:
            break
    sent.append(words.finish())
    # spaces before the first word are never said, so that no stop word is found in them; the first one to be complete
    # ends the answer, where it begins
    whole = text.lstrip()
    ends = [end for end in range(1, len(whole) + 1) if any(one and whole[:end].endswith(one) for one in stop)]
    if ends:
        begins = [ends[0] - len(one) for one in stop if one and whole[: ends[0]].endswith(one)]
        whole = whole[: min(begins)]
    assert "".join(sent) == whole.rstrip()
    assert words.stopped == bool(ends)


def test_words_of_a_real_tokenizer(shapes):
    tokenizer = shapes.processor.tokenizer
    text = "a red circle, a blue star, yellow square"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    words = Words(tokenizer)
    assert "".join([words.push(token) for token in ids] + [words.finish()]) == tokenizer.decode(ids).strip()


def messages(*turns) -> list[Message]:
    return [Message.model_validate({"role": role, "content": content}) for role, content in turns]


def test_messages_become_turns():
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    found = conversation(
        messages(
            ("system", "be short"),
            ("user", [picture, {"type": "text", "text": "what?"}]),
            ("assistant", "a dog"),
            ("user", "really"),
            ("user", "?"),
        ),
        4,
    )
    assert found.turns == (
        ("user", [None, "be short\n", "what?"]),
        ("assistant", ["a dog"]),
        ("user", ["really", "\n", "?"]),
    )
    assert found.spoken[0] == ("user", ["be short\n", "what?"])
    for wrong, words in (
        (messages(("assistant", "hi"), ("user", "x")), "begins and ends"),
        (messages(("user", "hi"), ("assistant", "x")), "begins and ends"),
        (messages(("user", [picture])), "has no text"),
        (messages(("system", [picture]), ("user", "x")), "the user's to send"),
        (messages(("user", [picture] * 5 + [{"type": "text", "text": "x"}])), "at most 4 pictures"),
        (messages(("system", "hi")), "begins and ends"),
    ):
        with pytest.raises(ServiceError, match=words):
            conversation(wrong, 4)


def test_keys(tmp_path, monkeypatch):
    monkeypatch.setenv("MLLM_FAST_API_KEYS", "sk-from-the-environment-1, sk-from-the-environment-2")
    (tmp_path / "keys").write_text("sk-from-a-file-0123456  # whose\n\n")
    keys = Keys.find(tmp_path / "keys")
    scopes = {keys.scope(f"sk-from-{one}") for one in ("the-environment-1", "the-environment-2", "a-file-0123456")}
    assert len(scopes) == 3
    assert None not in scopes
    assert all("sk-" not in scope for scope in scopes)
    for wrong in (None, "", "sk-from-a-file-012345", "sk-from-a-file-01234567", "ü" * 20):
        assert keys.scope(wrong) is None
    assert Keys().scope(None) == Keys().scope("anything") == ""
    for wrong in ("short", "has a space in its middle", "ä" * 20):
        with pytest.raises(InputError, match="16 or more"):
            Keys([wrong])


def fetched(url: str, **options) -> bytes:
    return asyncio.run(pictures.picture_bytes(url, Settings(remote_hosts=("pictures.test", ".cdn.test"), **options)))


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "0.0.0.0", "::1", "fe80::1", "fd00::1",
     "::ffff:127.0.0.1", "::ffff:10.0.0.1", "224.0.0.1", "100.64.0.1", "64:ff9b::7f00:1"],
)  # fmt: skip
def test_a_listed_host_must_be_a_public_one(monkeypatch, address):
    """Wherever the name of a listed host leads, by mistake or by an attack on its DNS."""

    async def found(self, host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", port)), (0, 0, 0, "", (address, port))]

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", found)
    with pytest.raises(ServiceError, match="not a public host"):
        fetched("https://pictures.test/a.png")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://elsewhere.test/a.png", "not allowed"),
        ("https://evilcdn.test/a.png", "not allowed"),
        ("https://evilpictures.test/a.png", "not allowed"),
        ("https://pictures.test.evil.test/a.png", "not allowed"),
        ("http://pictures.test/a.png", "begins with https"),
        ("https://pictures.test:8443/a.png", "without a port"),
        ("https://user@pictures.test/a.png", "user's name"),
        ("https://pictures.test@evil.test/a.png", "user's name"),
        ("https://[::1/a.png", "not valid"),
        ("ftp://pictures.test/a.png", "data URL"),
    ],
)
def test_urls_that_are_refused(url, words):
    with pytest.raises(ServiceError, match=words):
        fetched(url)


def test_a_remote_picture_is_fetched_from_the_address_that_was_checked(monkeypatch):
    """By a transport that answers in place of the network; too many bytes, redirects and errors are refused."""
    import httpx

    seen = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        if request.url.path == "/moved":
            return httpx.Response(302, headers={"Location": "http://127.0.0.1/"})
        return httpx.Response(200, content=b"picture" * (1 if request.url.path == "/a.png" else 1000))

    async def found(self, host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", port))]

    client = httpx.AsyncClient
    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", found)
    monkeypatch.setattr(httpx, "AsyncClient", lambda **kw: client(transport=httpx.MockTransport(answer), **kw))
    assert fetched("https://a.cdn.test/a.png") == b"picture"
    assert seen[0].url.host == "93.184.216.34"
    assert seen[0].headers["host"] == "a.cdn.test"
    assert seen[0].extensions["sni_hostname"] == "a.cdn.test"
    with pytest.raises(ServiceError, match="more than 100 bytes"):
        fetched("https://a.cdn.test/large.png", remote_bytes=100)
    with pytest.raises(ServiceError, match="answered with 302"):
        fetched("https://a.cdn.test/moved")


def test_the_oldest_silent_connection_makes_room():
    """Those that sent a request are not counted; those that wait too long are closed."""

    class Transport:
        aborted = False

        def abort(self):
            self.aborted = True

    connections = Connections(most=3, seconds=1)
    opened = [Transport() for _ in range(6)]
    for key, transport in enumerate(opened[:3]):
        connections.opened(key, transport)
    connections.settled(0)
    connections.opened(3, opened[3])
    assert not any(one.aborted for one in opened)
    connections.opened(4, opened[4])
    assert [one.aborted for one in opened] == [False, True, False, False, False, False]
    connections.late(3)
    connections.late(0)
    assert [one.aborted for one in opened] == [False, True, False, True, False, False]
    assert connections.closed == 2


def test_a_body_that_does_not_come(capsys):
    """The guard waits a while, and tells what happened; nothing of it hangs on the routes."""

    async def app(scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        raise AssertionError("not reached")

    async def silent():
        await asyncio.sleep(60)

    sent = []

    async def send(message):
        sent.append(message)

    guard = Guard(app, 100, Log(None), Metrics(), body_seconds=0.05)
    asyncio.run(guard({"type": "http", "method": "POST", "headers": []}, silent, send))
    assert sent[0]["status"] == 408


def test_what_the_server_is_to_blame_for_is_told_in_general_words():
    found = service_error(RuntimeError("/secret/path: the key is sk-123"))
    assert found.status == 500
    assert "secret" not in json_of(found)
    assert "sk-" not in json_of(found)
    assert service_error(InputError("the window is 5")).status == 400
    import pickle

    again = pickle.loads(pickle.dumps(ServiceError(429, "later", code="queue_full", retry_after=3)))
    assert (again.status, again.headers, again.body["error"]["code"]) == (429, {"Retry-After": "3"}, "queue_full")


def json_of(error: ServiceError) -> str:
    import json

    return json.dumps(error.body)


def test_a_context_holds_what_the_page_on_sizes_says(vlm, picture):
    ctx = vlm.compress(picture, 0.3, PROMPT, "norm")
    layers, heads, _, width = ctx.keys.shape
    assert ctx.keys.nbytes + ctx.values.nbytes == 2 * layers * heads * width * ctx.keys.itemsize * ctx.num_tokens


def test_every_family_can_be_served(family, built):
    assert tiny.BUILD[family]
    assert Engine(mf.VLM(*built(family))).nbytes == 0
