"""The server's parts without HTTP: tokens to text, messages, keys, remote images, bounds, errors."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import socket
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import HANG

from mllm_fast.core.errors import InputError
from mllm_fast.models.ready_inputs import ReadyInputs
from mllm_fast.serving import image_fetch as pictures
from mllm_fast.serving import middleware
from mllm_fast.serving.app import create_app
from mllm_fast.serving.auth import ApiKeys
from mllm_fast.serving.budgets import Lane
from mllm_fast.serving.connections import Connections
from mllm_fast.serving.detokenizer import AnswerDetokenizer
from mllm_fast.serving.errors import ServiceError, service_error
from mllm_fast.serving.logs import Log
from mllm_fast.serving.messages import conversation
from mllm_fast.serving.metrics import Metrics
from mllm_fast.serving.middleware import RequestGuardMiddleware
from mllm_fast.serving.responses import ResponseChunk
from mllm_fast.serving.routes.answers import summed
from mllm_fast.serving.routes.state import Probes
from mllm_fast.serving.schema import ChatRequest, Details, Message, Usage
from mllm_fast.serving.settings import Settings

PROMPT = "describe this picture"
QUESTION = "what color is the circle ?"


class Letters:
    """A tokenizer of single bytes: characters of several tokens, and spaces that hang on what stands before."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return bytes(one for one in ids if one or not skip_special_tokens).decode("utf-8", "replace")


@settings(max_examples=300)
@given(text=st.text(alphabet="ab \nä€😀", max_size=30), stop=st.lists(st.text(alphabet="ab ä", max_size=4), max_size=3))
def test_words_come_whole_and_stop_in_time(text, stop):
    words = AnswerDetokenizer(Letters(), stop)
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
    words = AnswerDetokenizer(tokenizer)
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
        Settings(max_pictures=4),
    )
    assert found.turns == (
        ("user", [None, "be short\n", "what?"]),
        ("assistant", ["a dog"]),
        ("user", ["really", "\n", "?"]),
    )
    assert found.spoken[0] == ("user", ["be short\n", "what?"])
    assert conversation(messages(("assistant", "hi"), ("user", "x")), Settings()).turns == (
        ("user", ["Hello."]),
        ("assistant", ["hi"]),
        ("user", ["x"]),
    )
    assert conversation(messages(("user", [picture])), Settings()).turns == (("user", [None, "Describe the image."]),)
    for wrong, words in (
        (messages(("user", "hi"), ("assistant", "x")), "ends with a message of the user"),
        (messages(("user", " ")), "has no text"),
        (messages(("system", [picture]), ("user", "x")), "the user's to send"),
        (messages(("user", [picture] * 5 + [{"type": "text", "text": "x"}])), "at most 4 images"),
        (messages(("system", "hi")), "ends with"),
        (messages(("user", "x" * 400_001)), "at most 400,000 characters"),
    ):
        with pytest.raises(ServiceError, match=words):
            conversation(wrong, Settings(max_pictures=4))


def test_keys(tmp_path, monkeypatch):
    monkeypatch.setenv("MLLM_FAST_API_KEYS", "sk-from-the-environment-1, sk-from-the-environment-2")
    (tmp_path / "keys").write_text("sk-from-a-file-0123456  # whose\n\n")
    keys = ApiKeys.find(tmp_path / "keys")
    scopes = {keys.tenant(f"sk-from-{one}") for one in ("the-environment-1", "the-environment-2", "a-file-0123456")}
    assert len(scopes) == 3
    assert None not in scopes
    assert all("sk-" not in scope for scope in scopes)
    for wrong in (None, "", "sk-from-a-file-012345", "sk-from-a-file-01234567", "ü" * 20):
        assert keys.tenant(wrong) is None
    assert ApiKeys().tenant(None) == ApiKeys().tenant("anything") == ""
    for wrong in ("short", "has a space in its middle", "ä" * 20):
        with pytest.raises(InputError, match="16 or more"):
            ApiKeys([wrong])


def fetched(url: str, **options) -> bytes:
    return asyncio.run(pictures.picture_files([url], Settings(remote_hosts=("pictures.test", ".cdn.test"), **options)))[
        0
    ]


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "0.0.0.0", "::1", "fe80::1", "fd00::1",
     "::ffff:127.0.0.1", "::ffff:10.0.0.1", "224.0.0.1", "100.64.0.1", "64:ff9b::7f00:1", "::127.0.0.1",
     "::ffff:0:127.0.0.1", "fec0::1", "::a00:1", "::2", "192.88.99.1", "5f00::1", "3fff::1", "2002:7f00:1::"],
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
        ("https://pictures.test/a\x00.png", "printable"),
        ("https://pictures.test/" + "a" * 70_000, "at most 8,192"),
        ("data:image/png;base64,\ud800", "ASCII"),
        ("data:image/png,\ud800", "ASCII"),
        ("data:image/png;base64,a", "damaged"),
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
        if request.url.path == "/packed":
            return httpx.Response(200, content=gzip.compress(bytes(1 << 20)), headers={"Content-Encoding": "gzip"})

        async def parts():
            yield b"picture" * (1 if request.url.path == "/a.png" else 1000)

        return httpx.Response(200, content=parts())

    async def found(self, host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", port))]

    client = httpx.AsyncClient
    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", found)
    monkeypatch.setattr(httpx, "AsyncClient", lambda **kw: client(transport=httpx.MockTransport(answer), **kw))
    assert fetched("https://a.cdn.test/a.png") == b"picture"
    assert seen[0].url.host == "93.184.216.34"
    assert seen[0].headers["host"] == "a.cdn.test"
    assert seen[0].extensions["sni_hostname"] == "a.cdn.test"
    assert seen[0].headers["accept-encoding"] == "identity"  # a small answer must not become a large one in memory
    with pytest.raises(ServiceError, match="answered with compressed bytes"):
        fetched("https://a.cdn.test/packed", remote_bytes=10_000)
    with pytest.raises(ServiceError, match="at most 100 bytes together"):
        fetched("https://a.cdn.test/large.png", remote_bytes=100)
    with pytest.raises(ServiceError, match="answered with 302"):
        fetched("https://a.cdn.test/moved")


class Transport:
    """A connection's transport, from an address."""

    def __init__(self, address="192.0.2.1"):
        self.address, self.aborted = address, False

    def abort(self):
        self.aborted = True

    def get_extra_info(self, _):
        return self.address, 4711


def test_the_oldest_silent_connection_makes_room():
    """Those whose request is in progress stay; those that wait too long are closed."""
    connections = Connections(most=4, each=4, seconds=1)
    opened = [Transport() for _ in range(7)]
    for key, transport in enumerate(opened[:3]):
        connections.opened(key, transport)
    connections.busy(0)
    connections.opened(3, opened[3])
    assert not any(one.aborted for one in opened)
    connections.opened(4, opened[4])
    assert [one.aborted for one in opened] == [False, True, False, False, False, False, False]
    connections.late(3)
    connections.late(0)  # its request came in time
    assert [one.aborted for one in opened] == [False, True, False, True, False, False, False]
    connections.lost(4)
    connections.idle(0, opened[0])
    for key in (5, 6):
        connections.opened(key, opened[key])
    assert [one.aborted for one in opened] == [False, True, False, True, False, False, False]
    connections.busy(2)
    connections.busy(5)
    connections.busy(6)
    last = Transport()
    connections.opened(7, last)
    assert opened[0].aborted  # idle again, and now for longest
    assert not last.aborted
    assert connections.closed == 3


def test_no_address_takes_all_connections():
    connections = Connections(most=100, each=2)
    mine = [Transport(one) for one in ("192.0.2.1", "192.0.2.1", "192.0.2.1", "::ffff:192.0.2.1")]
    for key, transport in enumerate(mine):
        connections.opened(key, transport)
    assert [one.aborted for one in mine] == [True, True, False, False]
    other = [Transport("2001:db8:1:2::1"), Transport("2001:db8:1:2:ffff::9"), Transport("2001:db8:1:3::1")]
    for key, transport in enumerate(other, 10):
        connections.opened(key, transport)
    connections.opened(20, Transport("2001:db8:1:2::7"))  # of the network of the first two
    assert [one.aborted for one in other] == [True, False, False]
    for key in (2, 3):
        connections.busy(key)
    late = Transport("192.0.2.1")
    connections.opened(30, late)
    assert late.aborted  # the others' requests are in progress


def test_a_body_that_does_not_come(monkeypatch):
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

    guard = RequestGuardMiddleware(app, Settings(max_body=100), ApiKeys(), Log(None), Metrics(), body_seconds=0.05)
    monkeypatch.setattr(middleware, "_LINGER_SECONDS", 0.05)
    asyncio.run(guard({"type": "http", "method": "POST", "path": "/v1/x", "headers": []}, silent, send))
    assert sent[0]["status"] == 408


def test_what_the_server_is_to_blame_for_is_told_in_general_words():
    try:
        raise RuntimeError("/secret/path: the key is sk-123")
    except RuntimeError as error:
        found = service_error(error)
    # the log learns where, not what
    assert found.where.startswith("RuntimeError: test_serving_parts.py:")
    assert "secret" not in found.where
    assert found.status == 500
    assert "secret" not in json_of(found)
    assert "sk-" not in json_of(found)
    assert service_error(InputError("the window is 5")).status == 400
    import pickle

    again = pickle.loads(pickle.dumps(ServiceError(429, "later", code="queue_full", retry_after=3)))
    assert (again.status, again.headers, again.body["error"]["code"]) == (429, {"Retry-After": "3"}, "queue_full")


@pytest.mark.parametrize("stream", [False, True])
def test_the_operator_learns_where_an_error_came_from(stream):
    """The client is told that there was one, in its answer or in its stream; nobody what was sent."""
    from starlette.testclient import TestClient

    class Broken:
        name, settings = "broken", Settings()

        async def chat(self, request, scope, client):
            async def pieces():
                yield ResponseChunk("a")
                raise RuntimeError(f"secret: {request.messages}")

            return pieces()

    written = io.StringIO()
    app = create_app(Broken(), ApiKeys(), metrics=Metrics(), log=Log(written), probes=Probes())
    with TestClient(app) as client:
        body = {"messages": [{"role": "user", "content": "secret"}], "stream": stream}
        reply = client.post("/v1/chat/completions", json=body)
    assert "an unexpected RuntimeError in the server" in reply.text
    assert reply.status_code == (200 if stream else 500)
    assert "RuntimeError: test_serving_parts.py:" in written.getvalue()
    assert "secret" not in written.getvalue() + reply.text


def json_of(error: ServiceError) -> str:
    import json

    return json.dumps(error.body)


def test_the_log_may_be_called_while_it_writes():
    """A garbage collection inside a write may make a library log something, in the same thread."""

    class Stream(io.StringIO):
        def write(self, text):
            if "outer" in text and not self.getvalue():
                log("inner")
            return super().write(text)

    stream = Stream()
    log = Log(stream)
    thread = threading.Thread(target=log, args=("outer",), daemon=True)
    thread.start()
    thread.join(HANG)
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["outer", "inner"]


def test_a_client_that_leaves_as_its_place_comes():
    """The cancellation counts, and the place goes on to the next."""

    async def check():
        lane = Lane("things", 1, 4, 4)
        first = await lane.enter("a", 1.0)
        ran = []

        async def work():
            async with lane.place("a", HANG):
                ran.append(True)
                await asyncio.sleep(0)

        waiting = asyncio.ensure_future(work())
        await asyncio.sleep(0)
        first.leave()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not ran
        gone = asyncio.ensure_future(work())
        (await lane.enter("a", HANG)).leave()
        await gone
        held = await lane.enter("a", HANG)
        with pytest.raises(ServiceError, match="was free in 0 s"):
            await lane.enter("a", 0.0)
        left = asyncio.ensure_future(work())
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        held.leave()
        assert (lane._inside, len(lane._line), dict(lane._of)) == (0, 0, {})

    asyncio.run(check())


def test_token_counts_of_several_answers_do_not_depend_on_who_ends_first():
    new, held = (
        Usage(prompt_tokens=9, completion_tokens=n, prompt_tokens_details=Details(cached_tokens=c))
        for n, c in ((2, 0), (3, 8))
    )
    for usages in ({0: new, 1: held}, {1: held, 0: new}):
        made = summed(usages)
        assert (made.completion_tokens, made.prompt_tokens_details.cached_tokens) == (5, 0)


def test_limits_that_contradict_each_other():
    with pytest.raises(InputError, match=r"max_body .* is at most max_client_bodies"):
        Settings(max_body=1 << 30)


def test_a_request_survives_the_way_to_a_replica():
    """Every field, by the names that the interface has."""
    given = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "what ?"}]}],
        "keep": 0.25,
        "stop": ["."],
        "temperature": 0.5,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
    }
    request = ChatRequest.model_validate(given)
    assert ChatRequest.model_validate(request.model_dump(exclude_none=True, by_alias=True)) == request


def test_inputs_become_ready_while_others_are_looked_up():
    """In the event loop's thread and in the engine's, at the same time."""
    ready, ended = ReadyInputs(), threading.Event()
    failed: list[BaseException] = []

    def look() -> None:
        try:
            while not ended.is_set():
                assert not ready.has(object())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=look)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        for i in range(3000):
            with ready.holding([object() for _ in range(8)], str(i), ({}, [], [])):
                pass
    finally:
        ended.set()
        thread.join()
        sys.setswitchinterval(before)
    assert not failed
