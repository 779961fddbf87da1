"""What the browser tool gives out: nothing but what a browser uploaded itself and what was made for it. The requests
are those that Gradio's page makes, sent by hand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import uuid
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
import served
from PIL import Image
from served import KEY, OTHER
from waiting import HANG

from mllm_fast.core.assets import SAMPLE
from mllm_fast.core.errors import InputError
from mllm_fast.serving.ui_inputs import Inputs, Limits, of_query, of_store, query_of

if find_spec("gradio") is None:  # importing it here would import its warnings too
    pytest.skip("there is no gradio here: pip install gradio", allow_module_level=True)
SECRET = "the secret that no answer may hold"
PREFIX = "/ui/gradio_api"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("files")
    (made / "secret.txt").write_text(SECRET)
    (made / ".env").write_text(SECRET)
    (made / "keys").write_text(f"{KEY}\n{OTHER}\n")
    return made


@pytest.fixture(scope="module")
def server(folder):
    made = served.Server("--ui", cwd=folder)
    yield made
    made.stop()


class Browser:
    """A browser's part of the protocol: its cookies, its session, and what it heard."""

    def __init__(self, server: served.Server):
        self.http = httpx.Client(base_url=server.url, timeout=HANG, follow_redirects=True)
        self.session = uuid.uuid4().hex
        assert self.http.get("/ui/").status_code == 200

    def functions(self) -> list[dict]:
        config = self.http.get("/ui/config").json()
        kinds = {one["id"]: one["type"] for one in config["components"]}
        return [one | {"kinds": [kinds[i] for i in one["inputs"]]} for one in config["dependencies"]]

    def upload(self, path: Path = SAMPLE) -> str:
        (found,) = self.http.post(f"{PREFIX}/upload", files={"files": (path.name, path.read_bytes())}).json()
        return found

    def join(self, function: int, data: list) -> httpx.Response:
        body = {"data": data, "fn_index": function, "session_hash": self.session}
        return self.http.post(f"{PREFIX}/queue/join", json=body)

    def events(self, session: str | None = None) -> str:
        reply = self.http.get(f"{PREFIX}/queue/data", params={"session_hash": session or self.session})
        return reply.text if reply.status_code == 200 else ""

    def asking(self) -> int:
        """The function that answers a question."""
        return next(one["id"] for one in self.functions() if one["kinds"][:2] == ["image", "state"])

    def ask(self, picture: str, question: str = "What color is the star?") -> str:
        """The events of a question about an uploaded image."""
        told = self.join(self.asking(), asked(file(picture), question))
        assert told.status_code == 200, told.text
        return self.events()

    def read(self, path: str) -> httpx.Response:
        return self.http.get(f"{PREFIX}/file={path}")


def file(path: str) -> dict:
    return {"path": path, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}


def asked(picture: dict | None, question: str = "What color is the star?") -> list:
    """What the page sends with a question: an image, a state of the server's, and the values of the controls."""
    return [picture, None, question, [], 0, 5, 0, False, 64, 0, 1, "logprob"]


def paths_in(events: str) -> list[str]:
    found = []

    def walk(content):
        if isinstance(content, dict):
            found.extend(value for key, value in content.items() if key == "path" and isinstance(value, str))
            content = list(content.values())
        elif isinstance(content, list) and content[:1] == ["replace"] and content[1][-1:] == ["path"]:
            found.append(content[2])  # Gradio sends what changed since the last event
        for one in content if isinstance(content, list) else ():
            walk(one)

    for line in events.splitlines():
        if line.startswith("data:"):
            walk(json.loads(line[5:]))
    return found


@pytest.fixture
def opened():
    """Opens browsers of a server, and closes them."""
    made: list[Browser] = []

    def one(server: served.Server) -> Browser:
        made.append(Browser(server))
        return made[-1]

    yield one
    for browser in made:
        browser.http.close()


@pytest.fixture
def browser(opened, server):
    return opened(server)


def test_a_browser_reads_what_it_uploaded_and_what_was_made_for_it(browser):
    picture = browser.upload()
    assert browser.read(picture).content == SAMPLE.read_bytes()
    made = {one for one in paths_in(browser.ask(picture, "Describe the image.")) if one != picture}
    assert len(made) > 10, "there is a map a word"
    assert all(browser.read(one).status_code == 200 for one in made)


PLAIN = {"textbox": "What?", "checkboxgroup": [], "slider": 0, "checkbox": False, "radio": 0, "dropdown": "logprob"}


def test_no_component_takes_a_file_that_was_not_uploaded(browser, folder):
    """Each input of each function is given a file of the machine, in all forms that name one, and all paths that an
    answer names are asked for."""
    forms = [
        str(folder / "secret.txt"), "secret.txt", "./secret.txt", f"{folder}/../{folder.name}/secret.txt",
        f"file://{folder}/secret.txt", str(folder / ".env"), "/proc/self/environ", "/proc/self/cwd/secret.txt",
        f"{browser.http.base_url}healthz",
    ]  # fmt: skip
    heard = []
    for function in browser.functions():
        for at in range(len(function["inputs"])):
            for form in forms:
                given = [file(form), [file(form)], {"image": file(form)}, {"path": form}]
                for one in given[: 4 if form == forms[0] else 1]:
                    data = [PLAIN.get(kind) for kind in function["kinds"]]
                    data[at] = one
                    reply = browser.join(function["id"], data)
                    heard.append(reply.text)
                    if reply.status_code == 200:
                        heard.append(browser.events())
    told = "\n".join(heard)
    assert SECRET not in told
    paths = {*re.findall(r"/[^\s'\"\\\\]+", told), *forms}
    replies = {path: browser.read(path) for path in paths}
    assert not [path for path, reply in replies.items() if SECRET in reply.text]
    assert {reply.status_code for reply in replies.values()} == {404}


ALONE = """
import asyncio, json, sys
import httpx
from starlette.routing import Mount
import mllm_fast as mf
from mllm_fast.serving.auth import ApiKeys
from mllm_fast.serving.logs import Log
from mllm_fast.serving.server import application
from mllm_fast.serving.settings import Settings
from mllm_fast.serving.ui_backend import UIBackend
from mllm_fast.serving.ui import mount

log, keys, secret = Log(None), ApiKeys(), sys.argv[1]
app, service = application(mf.VLM.from_pretrained("shapes", device="cpu"), Settings(), keys, "shapes", log)
mount(app, UIBackend(service), keys, log)
inner = next(route for route in app.routes if isinstance(route, Mount)).app._app


async def tried():
    image = {"path": secret, "meta": {"_type": "gradio.FileData"}}
    body = {"data": [image, None, "What?", [], 0, 5, 0, False, 64, 0, 1, "logprob"], "session_hash": "a"}
    transport = httpx.ASGITransport(app=inner)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://here", timeout=None) as http,
    ):
        config = (await http.get("/config")).json()
        kinds = {one["id"]: one["type"] for one in config["components"]}
        given = {one["id"]: [kinds[i] for i in one["inputs"]] for one in config["dependencies"]}
        asking = next(one for one, inputs in given.items() if inputs[:2] == ["image", "state"])
        joined = await http.post("/gradio_api/queue/join", json=body | {"fn_index": asking})
        events = await http.get("/gradio_api/queue/data", params={"session_hash": "a"})
        given = await http.get(f"/gradio_api/file={secret}")
        return {"joined": joined.status_code, "events": events.text, "given": given.status_code}


print(json.dumps(asyncio.run(tried())))
"""


def test_what_the_tool_lets_through_gradio_checks(folder):
    """The second wall: the mounted application alone refuses a file that was not uploaded."""
    command = [sys.executable, "-W", "ignore", "-c", ALONE, str(folder / "secret.txt")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["joined"] == 200
    assert "was not uploaded by a user" in found["events"]
    assert found["given"] == 403


def test_another_browser_reads_nothing_of_it(opened, server, browser):
    picture = browser.upload()
    seen = [picture, *paths_in(browser.ask(picture))]
    stranger = opened(server)
    assert {stranger.read(path).status_code for path in seen} == {404}
    function = stranger.asking()
    assert stranger.join(function, asked(file(picture))).status_code == 404
    # nor its events, nor as its session
    browser.join(function, asked(file(picture)))
    assert stranger.events(browser.session) == ""
    stranger.session = browser.session
    assert stranger.join(function, asked(None)).status_code == 404
    assert stranger.http.get(f"{PREFIX}/heartbeat/{browser.session}").status_code == 404
    assert "blue" in browser.events()
    # who uploads the same image may read it
    assert stranger.read(stranger.upload()).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/file=http://127.0.0.1/"),
        ("GET", "/file=https://example.org/"),
        ("GET", "/file//etc/passwd"),
        ("GET", "/proxy=https://example.org/"),
        ("GET", "/stream/a/b/0/playlist-file"),
        ("POST", "/component_server"),
        ("POST", "/process_recording"),
        ("POST", "/run/ask"),
        ("POST", "/api/ask"),
        ("POST", "/call/ask"),
        ("POST", "/vibe-edit"),
        ("POST", "/vibe-code"),
        ("GET", "/vibe-code"),
        ("GET", "/deep_link?session_hash=a"),
        ("GET", "/queue/status"),
        ("GET", "/../monitoring"),
        ("GET", "/runs"),
    ],
)
def test_what_the_page_does_not_need_is_closed(browser, method, path):
    reply = browser.http.request(method, PREFIX + path, json={} if method == "POST" else None)
    assert reply.status_code == 404, reply.text


def test_the_doors_have_keys(opened, folder):
    """With keys, a browser that has not logged in uploads and reads nothing."""
    server = served.Server("--ui", "--api-keys", folder / "keys", cwd=folder)
    try:
        users = [opened(server) for _ in range(3)]
        for one, key in zip(users, (KEY, OTHER), strict=False):
            assert one.http.post("/ui/login", data={"username": "a", "password": key}).status_code == 200
        picture = users[0].upload()
        assert [one.read(picture).status_code for one in users] == [200, 404, 401]
        stranger = users[2].http
        assert stranger.post(f"{PREFIX}/upload", files={"files": ("a", b"a")}).status_code == 401
        session = {"session_hash": users[0].session}
        for path in ("cancel", "reset", "queue/join", "api/predict"):
            assert stranger.post(f"{PREFIX}/{path}", json=session).status_code == 401, path
        for path in ("queue/data", "queue/status", "startup-events", "app_id", "token", "info", "openapi.json"):
            assert stranger.get(f"{PREFIX}/{path}", params=session).status_code == 401, path
        assert stranger.get(f"{PREFIX}/heartbeat/{users[0].session}").status_code == 401
        assert users[0].ask(picture).count("process_completed")  # nobody else has claimed its streams
        tries = [stranger.post("/ui/login", data={"username": "a", "password": "b"}).status_code for _ in range(12)]
        assert tries[0] == 400
        assert tries[-1] == 429
    finally:
        server.stop()


@pytest.mark.parametrize("kind", ["TGA", "PCX", "ICNS", "DDS", "JPEG2000", "PPM"])
def test_formats_are_those_of_the_server(opened, server, tmp_path, kind):
    """Gradio opens no file that the server would refuse."""
    path = tmp_path / "a.png"
    Image.new("RGB", (64, 64), "red").save(path, kind)
    browser = opened(server)
    picture = browser.upload(path)
    function = browser.asking()
    told = browser.join(function, asked(file(picture)))
    assert told.status_code == 400
    assert "not an image in PNG" in told.text


def test_large_images_are_refused_before_they_are_decoded(opened, server, tmp_path):
    Image.new("1", (13_000, 13_000)).save(tmp_path / "a.png")
    browser = opened(server)
    picture = browser.upload(tmp_path / "a.png")
    function = browser.asking()
    told = browser.join(function, asked(file(picture)))
    assert told.status_code == 400
    assert "the limit is 25,000,000" in told.text


def test_what_is_remembered_is_bounded(monkeypatch):
    """Of a browser that names ever new streams the last ones are kept, of ever new browsers the last ones."""
    import asyncio

    from mllm_fast.serving import ui_sessions

    monkeypatch.setattr(ui_sessions, "_MOST_SESSIONS", 3)
    monkeypatch.setattr(ui_sessions, "_MOST_STREAMS", 5)

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    guard = ui_sessions.UISessionMiddleware(app, 3600)

    def get(cookie: int, name: str) -> int:
        heard = []

        async def send(message):
            heard.append(message)

        scope = {
            "type": "http", "path": f"/gradio_api/heartbeat/{name}", "query_string": b"", "method": "GET",
            "headers": [(b"cookie", f"a=b; {ui_sessions.COOKIE}={cookie:064x}; c=d".encode())],
        }  # fmt: skip
        asyncio.run(guard(scope, None, send))
        return heard[0]["status"]

    assert [get(1, f"s{i}") for i in range(9)] == [200] * 9
    assert get(2, "s8") == 404
    assert get(2, "s0") == 200  # forgotten, and taken by another
    assert get(1, "s0") == 404
    for cookie in range(3, 9):
        assert get(cookie, f"c{cookie}") == 200
    assert len(guard._sessions) <= 4
    assert set(guard._owners) == {name for session in guard._sessions.values() for name in session.streams}


LIMITS = Limits(layers=6, tokens=256, usual_tokens=64, methods=("logprob", "rollout"), joint=False)


def test_a_link_says_what_the_controls_say():
    usual = Inputs.usual(LIMITS)
    assert query_of(usual, LIMITS, sample=False) == "?question=Describe+the+image."
    other = replace(
        usual, question="Where is 50 % & more?", knockout=("image to answer",), first=2, last=3, keep=7.0,
        tokens=9, temperature=0.35, top_p=0.9, method="rollout", word=4,
    )  # fmt: skip
    found, sample = of_query(query_of(other, LIMITS, sample=True))
    assert (Inputs.checked(found, LIMITS), sample) == (other, True)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("first", "6", "a whole number from 0 to 5, got '6'"),
        ("last", 1.5, "a whole number from 0 to 5, got 1.5"),
        ("first", "5e999", "a whole number from 0 to 5"),
        ("keep", "nan", "a number from 0 to 100, got 'nan'"),
        ("tokens", "257", "a whole number from 1 to 256, got '257'"),
        ("tokens", [1], r"a whole number from 1 to 256, got \[1\]"),
        ("temperature", "-1", "a number from 0 to 2, got '-1'"),
        ("top_p", 0, "a number from 0.05 to 1, got 0"),
        ("knockout", "image to moon", "any of image to question, "),
        ("knockout", [["image to answer"]], "any of image to question, "),
        ("joint", "1", "no joint model"),
        ("joint", "yes", "joint is 1 or 0, got 'yes'"),
        ("method", "tam", "one of logprob, rollout; got 'tam'"),
        ("question", {"path": "/etc/passwd"}, "the question is a text"),
    ],
)
def test_values_from_outside_are_checked(name, value, words):
    with pytest.raises(InputError, match=words):
        Inputs.checked({name: value}, LIMITS)


def test_layers_of_a_knockout_have_an_order():
    with pytest.raises(InputError, match="at most the last one, got 4 and 2"):
        Inputs.checked({"first": "4", "last": "2"}, LIMITS)


@pytest.mark.parametrize("text", [None, "", "{", "[1]", "[" * 100_000, '{"a": 1}'])
def test_what_a_browser_kept_may_be_anything(text):
    assert of_store(text) == {}
