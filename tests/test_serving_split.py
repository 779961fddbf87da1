"""A server whose model is divided between two processes: what it answers is what the library answers with one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import served
import transformers
from packaging.version import Version
from PIL import Image
from safetensors.torch import load
from served import asked, data_url
from waiting import HANG

from mllm_fast.core.assets import SAMPLE
from mllm_fast.shapes.scenes import generate_scene

COLOR = "What color is the star?"
DESCRIBE = "Describe the image."
PICTURE = Image.open(SAMPLE).convert("RGB")
URL = data_url(PICTURE)
pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"), reason="this transformers divides no models by a config"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("divided")


@pytest.fixture(scope="module")
def server(folder):
    made = served.Server("--tp", 2, "--device", "cpu", cwd=folder)
    yield made
    made.stop()


def chat(server, messages, **options):
    return server.client().chat.completions.create(**{"model": "shapes", "messages": messages, **options})


def text(reply) -> str:
    return reply.choices[0].message.content


def test_answers_are_those_of_the_library(server, shapes):
    context = shapes.compress(PICTURE)
    for question in (COLOR, DESCRIBE):
        assert text(chat(server, asked(question, URL))) == context.ask(question, max_new_tokens=256).text
    off = chat(server, asked(DESCRIBE, URL), extra_body={"keep": "off"})
    assert text(off) == shapes.generate(PICTURE, DESCRIBE, max_new_tokens=256).text
    assert text(chat(server, asked("what is there"))) == shapes.generate(None, "what is there").text


def test_many_at_once(server, shapes):
    """Contexts that are made and used while others are decoded, streams that are given up among them."""
    images = [generate_scene(np.random.default_rng(seed)).image for seed in range(6)]

    def one(i: int) -> str:
        image = images[i % len(images)]
        if i % 5 == 4:
            stream = chat(server, asked(DESCRIBE, data_url(image)), stream=True)
            next(iter(stream))
            stream.close()
            return ""
        return text(chat(server, asked((COLOR, DESCRIBE)[i % 2], data_url(image))))

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(one, range(30)))
    contexts = [shapes.compress(image) for image in images]
    for i, answer in enumerate(found):
        if i % 5 != 4:
            assert answer == contexts[i % len(images)].ask((COLOR, DESCRIBE)[i % 2], max_new_tokens=256).text


def test_sampling_is_the_first_process_s(server):
    hot = {"temperature": 2.0, "seed": 7, "max_tokens": 12}
    first = text(chat(server, asked(DESCRIBE, URL), **hot))
    assert text(chat(server, asked(DESCRIBE, URL), **hot)) == first
    chat(server, asked(DESCRIBE, URL), temperature=2.0, max_tokens=12)  # a seed of its own


def test_explanations(server, shapes):
    body = {"model": "shapes", "messages": asked(COLOR, URL), "format": "safetensors"}
    with server.http() as http:
        reply = http.post("/v1/explanations", json=body)
    assert reply.status_code == 200, reply.text
    ex = shapes.explain(PICTURE, COLOR)
    buffer = load(reply.content)
    assert (buffer["head_scores"] - ex.head_scores).abs().max() < 1e-4
    assert (buffer["head_scores"] - ex.head_scores).abs().max() < 1e-3 * ex.head_scores.abs().max()


def test_contexts_may_be_deleted(server):
    made = chat(server, asked(COLOR, URL))
    with server.http() as http:
        names = http.get("/v1/contexts").json()["data"]
        assert names
        for one in names:
            assert http.delete(f"/v1/contexts/{one['id'] if isinstance(one, dict) else one}").status_code == 200
    assert text(chat(server, asked(COLOR, URL))) == text(made)


def processes_of(server) -> list[int]:
    """The ids of the processes that a server has started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(server.process.pid)], capture_output=True, text=True)
    return [int(one) for one in found.stdout.split()]


def test_a_process_that_is_killed_ends_the_server(folder):
    """In the middle of its load: every client gets an error or an answer, and all processes are gone."""
    server = served.Server("--tp", 2, "--device", "cpu", cwd=folder)
    try:
        children = processes_of(server)
        assert len(children) == 2

        def one(i: int) -> str:
            try:
                return text(chat(server, asked(f"{DESCRIBE} {i}", URL), max_tokens=40))
            except Exception as error:
                return type(error).__name__

        with ThreadPoolExecutor(8) as pool:
            running = [pool.submit(one, i) for i in range(24)]
            running[2].result(HANG)
            os.kill(children[1], signal.SIGKILL)
            assert server.process.wait(30) != 0
            assert all(done.result(HANG) for done in running)
        for child in children:
            with pytest.raises(ProcessLookupError):
                os.kill(child, 0)
    finally:
        server.stop()


def test_what_a_divided_model_does_not_serve(folder):
    command = [sys.executable, "-m", "mllm_fast", "serve", "--port", "0", "--tp", "2", "--device", "cpu"]
    done = subprocess.run([*command, "--store", "contexts"], capture_output=True, text=True, cwd=folder, timeout=HANG)
    assert done.returncode == 2
    assert "keeps its contexts in memory" in done.stderr


def test_the_first_process_ends_the_others(server):
    children = processes_of(server)
    assert server.stop() == 0
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
