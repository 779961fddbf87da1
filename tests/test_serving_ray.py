"""Two replicas of the embedded model behind Ray Serve, on this machine: one of them is killed amid 200 requests."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import transformers
from packaging.version import Version
from served import asked, data_url
from waiting import HANG, until

from mllm_fast.core.errors import InputError
from mllm_fast.shapes.scenes import generate_scene

needs_new = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"), reason="this transformers divides no models by a config"
)
QUESTIONS = ["Describe the image.", "How many objects are there?", "is there a red circle?", "is there a blue star?"]


@contextmanager
def running(folder: Path, options: str) -> Iterator[int]:
    """The application with some options, run by a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = f"""
        import threading, ray
        from ray import serve
        from mllm_fast.serving.ray_app import Options, app
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
        serve.start(http_options={{"host": "127.0.0.1", "port": {port}}})
        options = Options(min_replicas=2, cpus=0.5, keep=0.2, log=False, {options})
        serve.run(app(options), name="test{port}")
        print("running", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            serve.shutdown()
            ray.shutdown()
    """
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)],
            stdout=subprocess.PIPE, stderr=log, text=True, cwd=folder, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            line = process.stdout.readline()
            while line and not line.startswith("running"):
                line = process.stdout.readline()
            assert line, (folder / "log").read_text()[-3000:]
            yield port
        finally:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stdout.close()


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray")
    with running(folder, f"store={str(folder / 'store')!r}") as found:
        yield found


def replicas_of(port: int) -> list[int]:
    """The processes that hold a model."""
    name, found = f"ServeReplica:test{port}:Replica", []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if name in path.read_bytes().decode(errors="replace"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_a_replica_dies_amid_two_hundred_requests(port, shapes):
    rng, draw = np.random.default_rng(3), random.Random(3)
    pictures = [generate_scene(rng).image for _ in range(10)]
    expected = [[a.text for a in shapes.compress(p, 0.2).ask_many(QUESTIONS)] for p in pictures]
    urls = [data_url(p) for p in pictures]
    wanted = [(draw.randrange(10), draw.randrange(4)) for _ in range(200)]
    replicas = replicas_of(port)
    assert len(replicas) == 2
    killed = []

    def one(number: int) -> tuple[str, int]:
        picture, question = wanted[number]
        if number == 80:
            os.kill(replicas[0], signal.SIGKILL)
            killed.append(replicas[0])
        stream = number % 4 == 0
        reply = client.chat.completions.create(
            model="shapes", messages=asked(QUESTIONS[question], urls[picture]), stream=stream, max_tokens=32,
            **({"stream_options": {"include_usage": True}} if stream else {}),
        )  # fmt: skip
        if not stream:
            return reply.choices[0].message.content, reply.usage.prompt_tokens_details.cached_tokens
        chunks = list(reply)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        return text, chunks[-1].usage.prompt_tokens_details.cached_tokens

    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0, timeout=HANG)
    with client, ThreadPoolExecutor(8) as pool:
        got = list(pool.map(one, range(200)))
    assert killed
    assert [text for text, _ in got] == [expected[p][q] for p, q in wanted]
    firsts: set[int] = set()
    repeats = []
    for (picture, _), (_, cached) in zip(wanted, got, strict=True):
        if picture in firsts:
            repeats.append(cached > 0)
        firsts.add(picture)
    print(f"{sum(repeats)} of {len(repeats)} repeats came from a context")
    assert sum(repeats) >= 0.9 * len(repeats)
    until(lambda: len(set(replicas_of(port)) - set(killed)) == 2)  # and it is replaced


def test_the_whole_interface_is_there(port):
    rng = np.random.default_rng(11)
    url = data_url(generate_scene(rng).image)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=HANG) as http:
        made = http.post("/v1/contexts", json={"images": [{"url": url}]})
        assert made.status_code == 201, made.text
        identity = made.json()["id"]
        assert identity in [one["id"] for one in http.get("/v1/contexts").json()["data"]]
        body = {"messages": [{"role": "user", "content": QUESTIONS[1]}], "context": identity}
        assert (
            http.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        )
        drawn = http.post("/v1/explanations", json={"messages": asked(QUESTIONS[1], url), "format": "png"})
        assert drawn.content.startswith(b"\x89PNG")
        assert http.delete(f"/v1/contexts/{identity}").json()["deleted"]
        assert http.get(f"/v1/contexts/{identity}").status_code == 404
        for wrong in (
            {"keep": -1},
            {"messages": asked("x", "data:image/png;base64,AAAA")},
            {"stream": True, "max_tokens": 9999},
        ):
            reply = http.post("/v1/chat/completions", json={"messages": asked("what is there?", url)} | wrong)
            assert reply.status_code == 400, reply.text
            assert reply.json()["error"]["type"] == "invalid_request_error"
        assert http.get("/v1/contexts/../../etc/passwd").status_code == 404
        assert "mllm_fast_request_seconds" in http.get("/metrics").text


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments")  # within Ray Serve
def test_options_come_as_text():
    from mllm_fast.serving.ray_app import Options, app

    options = Options(
        keep="off", max_batch="8", time_limit="7.5", remote_hosts="a.test, .b.test", store="/s", gpus="0.5"
    )
    settings = options.settings
    assert (settings.keep, settings.max_batch, settings.time_limit, settings.store) == (None, 8, 7.5, "/s")
    assert settings.remote_hosts == ("a.test", ".b.test")
    assert Options(keep="0.1").settings.keep == 0.1
    assert app({"model": "shapes", "max_batch": "8", "cpus": "0.5", "log": "false"})  # as `serve run` gives them
    with pytest.raises(InputError, match="unknown options max_batches; there are model"):
        app(Options(max_batches=3))


class Replicas:
    """In place of a handle: each request meets the next of some replicas, which give pieces and may die."""

    def __init__(self, *lives: list):
        self.lives = list(lives)
        self.sessions: list[str | None] = []
        self.seeds: list[int] = []

    def options(self, *, session_id: str | None = None, **_):
        self.sessions.append(session_id)
        return self

    def remote(self, content, *_):
        self.seeds.append(content["seed"])
        return Life(self.lives.pop(0))


class Life:
    def __init__(self, pieces: list):
        self.pieces = pieces

    async def __aiter__(self):
        for piece in self.pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def cancel(self) -> None:
        pass


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments")
@pytest.mark.parametrize("sent", [0, 1, 2, 3])
def test_an_answer_goes_on_where_another_replica_left_it(sent):
    """Nothing comes twice, whatever pieces the second one makes of the same answer; log-probabilities neither."""
    import asyncio

    from ray.exceptions import RayActorError

    from mllm_fast.serving.ray_app import Remote
    from mllm_fast.serving.responses import ResponseChunk
    from mllm_fast.serving.schema import ChatRequest
    from mllm_fast.serving.settings import Settings

    first = [
        ResponseChunk("a blue", ({"n": 0}, {"n": 1})),
        ResponseChunk(" st", ({"n": 2},)),
        ResponseChunk("ar", ({"n": 3},)),
    ]
    second = [
        ResponseChunk("a", ({"n": 0},)),
        ResponseChunk(" blue star", ({"n": 1}, {"n": 2}, {"n": 3})),
        ResponseChunk(", a ring", ({"n": 4},)),
    ]
    second.append(ResponseChunk("", (), "stop"))
    body = {"messages": [{"role": "user", "content": "what?"}]}

    async def ask(**options) -> tuple[list[ResponseChunk], list[int]]:
        replicas = Replicas([*first[:sent], RayActorError()], list(second))
        remote = Remote(replicas, "shapes", Settings())  # type: ignore[arg-type]
        pieces = await remote.chat(ChatRequest.model_validate(body | options), "", "")
        return [piece async for piece in pieces], replicas.seeds

    for options in ({}, {"temperature": 1.0, "seed": 7}, {"temperature": 1.0}):
        got, seeds = asyncio.run(ask(**options))
        assert "".join(piece.text for piece in got) == "a blue star, a ring"
        assert [entry["n"] for piece in got for entry in piece.logprobs] == [0, 1, 2, 3, 4]
        assert got[-1].finish == "stop"
        assert len(seeds) == 2
        assert len(set(seeds)) == 1  # what is drawn at random comes out the same another time
        assert seeds[0] == options.get("seed", seeds[0])


def test_a_stream_that_is_left_gives_its_place_back(shapes):
    """In a replica, whose caller closes the generator between two pieces."""
    import asyncio

    from mllm_fast.serving.ray_app import Replica
    from mllm_fast.serving.service import Service
    from mllm_fast.serving.settings import Settings

    class Own(Replica.func_or_class):  # type: ignore[misc, name-defined]
        def __init__(self):
            self._service, self._started = Service(shapes, Settings()), False

    async def run() -> tuple[int, int]:
        replica = Own()
        body = {"messages": [{"role": "user", "content": "Describe the image."}], "max_tokens": 30}
        for _ in range(3):
            pieces = replica.chat(body, "", "")
            await anext(pieces)
            await pieces.aclose()
        lane = replica._service._requests
        return lane._inside, len(lane._of)

    assert asyncio.run(run()) == (0, 0)


def followers_of(replica: int) -> list[int]:
    """The processes that a replica has started for the rest of its model."""
    found = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(replica)], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in found.splitlines() if "mllm_fast.serving.follower" in line]


@needs_new
def test_a_process_of_a_divided_replica_dies(tmp_path, shapes):
    """Two replicas of two processes each: one of the four is killed, its replica ends, and the other one answers."""
    rng = np.random.default_rng(5)
    pictures = [generate_scene(rng).image for _ in range(4)]
    expected = [[a.text for a in shapes.compress(p, 0.2).ask_many(QUESTIONS)] for p in pictures]
    urls = [data_url(p) for p in pictures]
    with running(tmp_path, "tp=2, device='cpu'") as port:
        replicas = replicas_of(port)
        followers = [followers_of(one) for one in replicas]
        assert [len(one) for one in followers] == [1, 1]

        def one(number: int) -> str:
            if number == 24:
                os.kill(followers[0][0], signal.SIGKILL)
            messages = asked(QUESTIONS[number % 4], urls[number // 4 % 4])
            reply = client.chat.completions.create(model="shapes", messages=messages, max_tokens=32)
            return reply.choices[0].message.content

        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0, timeout=HANG)
        with client, ThreadPoolExecutor(6) as pool:
            got = list(pool.map(one, range(64)))
        assert got == [expected[number // 4 % 4][number % 4] for number in range(64)]
        until(lambda: replicas[0] not in replicas_of(port))


def test_options_of_a_divided_replica():
    from mllm_fast.serving.ray_app import Options, app

    with pytest.raises(InputError, match=r"tp=2 takes as many GPUs a replica, or none; got gpus=1"):
        app({"tp": "2", "gpus": "1"})
    with pytest.raises(InputError, match="keeps its contexts in memory"):
        app(Options(tp=2, store="contexts"))
