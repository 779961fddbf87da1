"""The server as its users meet it: a process of its own, and OpenAI's client, unmodified, over loopback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import served
from PIL import Image
from served import KEY, OTHER, asked, data_url
from waiting import HANG, until

import mllm_fast as mf
from mllm_fast.core.assets import SAMPLE
from mllm_fast.shapes.scenes import generate_scene

COLOR = "What color is the star?"
DESCRIBE = "Describe the image."


@pytest.fixture(scope="module")
def sample():
    return Image.open(SAMPLE).convert("RGB")


@pytest.fixture(scope="module")
def url(sample):
    return data_url(sample)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    (folder / "keys").write_text(f"# two tenants\n{KEY}\n{OTHER}\n")
    made = served.Server("--api-keys", folder / "keys", "--store", folder / "store", "--max-body", 1, cwd=folder)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A model that never ends its answers, two of them at a time."""
    folder = tmp_path_factory.mktemp("endless")
    model = served.endless(folder / "model")
    made = served.Server(
        "--model", model, "--served-name", "endless", "--max-batch", 2, "--max-queue", 2, "--store", folder / "store",
        "--keep", "20%", *served.SLOW, cwd=folder,
    )  # fmt: skip
    yield made
    made.stop()


def chat(client: openai.OpenAI, messages: list[dict], **options):
    return client.chat.completions.create(**{"model": "shapes", "messages": messages, **options})


def test_answers_as_the_library_does_and_reads_a_picture_once(server, url, sample, shapes):
    ctx = shapes.compress(sample)
    questions = [COLOR, DESCRIBE, "How many objects are there?", "is there a red circle?"]
    client = server.client()
    replies = [chat(client, asked(question, url)) for question in questions]
    assert [reply.choices[0].message.content for reply in replies] == [a.text for a in ctx.ask_many(questions)]
    assert {reply.choices[0].finish_reason for reply in replies} == {"stop"}
    assert replies[0].usage.prompt_tokens_details.cached_tokens == 0
    for question, reply in zip(questions[1:], replies[1:], strict=True):
        assert reply.usage.prompt_tokens_details.cached_tokens == ctx.prefix_length
        asked_ids = shapes.prompts.turn_ids(DESCRIBE, 1, question)
        assert reply.usage.prompt_tokens == ctx.prefix_length + len(asked_ids)
        assert reply.usage.completion_tokens == len(ctx.ask(question).token_ids)
    assert replies[0].context["tokens"] == ctx.num_tokens
    # the same pixels in another file are the same image
    again = chat(client, asked(COLOR, data_url(sample, "BMP")))
    assert again.usage.prompt_tokens_details.cached_tokens == ctx.prefix_length


def test_keep_is_a_field_of_the_request(server, url, sample, shapes):
    client = server.client()
    whole = chat(client, asked(DESCRIBE, url), extra_body={"keep": "off"})
    assert whole.choices[0].message.content == shapes.generate(sample, DESCRIBE).text
    assert whole.usage.prompt_tokens_details.cached_tokens == 0
    assert "context" not in whole.model_extra
    for keep in (0.2, 7, 1.0):
        reply = chat(client, asked(DESCRIBE, url), extra_body={"keep": keep})
        ctx = shapes.compress(sample, keep)
        assert reply.choices[0].message.content == ctx.ask(DESCRIBE).text
        assert reply.context["tokens"] == ctx.num_tokens


def test_streams(server, url, sample, shapes):
    answer = shapes.compress(sample, 0.2).ask(DESCRIBE)  # a long one
    options = {"stream_options": {"include_usage": True}, "extra_body": {"keep": 0.2}}
    stream = chat(server.client(), asked(DESCRIBE, url), stream=True, **options)
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert "".join(texts) == answer.text
    assert len(texts) > 5
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(answer.token_ids)


def test_a_conversation_goes_on(server, url, sample, shapes):
    """Earlier turns are read again; without images in between, and with a system's words before them."""
    messages = asked(COLOR, url)
    messages += [{"role": "assistant", "content": "blue"}, {"role": "user", "content": "How many objects are there?"}]
    reply = chat(server.client(), messages)
    ctx = shapes.compress(sample)
    talk = ctx.chat()
    assert talk.ask(COLOR).text == "blue"
    assert reply.choices[0].message.content == talk.ask("How many objects are there?").text
    assert reply.usage.prompt_tokens_details.cached_tokens == ctx.prefix_length
    told = chat(server.client(), [{"role": "system", "content": "what is there"}, *asked(COLOR, url)])
    assert told.choices[0].message.content == ctx.ask("what is there\n" + COLOR).text


def test_text_alone_and_several_pictures(server, url, sample, shapes):
    alone = chat(server.client(), [{"role": "user", "content": COLOR}])
    assert alone.choices[0].message.content == shapes.generate(None, COLOR).text
    both = [sample, sample.rotate(90)]
    reply = chat(server.client(), asked(DESCRIBE, *map(data_url, both)))
    assert reply.choices[0].message.content == shapes.compress(both).ask(DESCRIBE).text


def test_many_at_once_are_each_answered_as_alone(server, shapes):
    rng = np.random.default_rng(5)
    pictures = [generate_scene(rng).image for _ in range(6)]
    questions = [COLOR, DESCRIBE, "How many objects are there?", "is there a red circle?", "What color is the ring?"]
    wanted = [(i, q) for i in range(6) for q in questions] * 3
    expected = {(i, q): shapes.compress(p).ask(q).text for i, p in enumerate(pictures) for q in questions}
    urls = [data_url(p) for p in pictures]
    with ThreadPoolExecutor(24) as pool:
        clients = [server.client() for _ in range(24)]
        jobs = [pool.submit(chat, clients[n % 24], asked(q, urls[i]), max_tokens=32) for n, (i, q) in enumerate(wanted)]
        replies = [job.result() for job in jobs]
    for which, reply in zip(wanted, replies, strict=True):
        assert reply.choices[0].message.content == expected[which]
    # each image was read once, however many asked at the same time
    assert sum(reply.usage.prompt_tokens_details.cached_tokens == 0 for reply in replies) == 6


def test_sampling_and_log_probabilities(server, url):
    client = server.client()
    options = {"temperature": 1.5, "top_p": 0.95, "max_tokens": 12}
    drawn = {s: chat(client, asked(DESCRIBE, url), seed=s, **options).choices[0].message.content for s in range(6)}
    assert len(set(drawn.values())) > 1
    with ThreadPoolExecutor(6) as pool:  # whatever runs beside it
        again = list(pool.map(lambda s: chat(server.client(), asked(DESCRIBE, url), seed=s, **options), range(6)))
    assert [reply.choices[0].message.content for reply in again] == list(drawn.values())
    reply = chat(client, asked(COLOR, url), logprobs=True, top_logprobs=3)
    (first,) = reply.choices[0].logprobs.content
    assert first.token == "blue"
    assert first.logprob == first.top_logprobs[0].logprob
    assert len(first.top_logprobs) == 3
    assert bytes(first.bytes).decode() == "blue"


def test_stops_where_it_is_told(server, url, sample, shapes):
    whole = shapes.compress(sample, 0.2).ask(DESCRIBE).text
    assert "blue star" in whole
    more = {"extra_body": {"keep": 0.2}}
    reply = chat(server.client(), asked(DESCRIBE, url), max_completion_tokens=3, **more)
    assert reply.choices[0].finish_reason == "length"
    assert whole.startswith(reply.choices[0].message.content)
    assert reply.usage.completion_tokens == 3
    for stop in ("star", ["zebra", "blue star"]):
        cut = whole.partition(stop if isinstance(stop, str) else stop[1])[0].rstrip()
        reply = chat(server.client(), asked(DESCRIBE, url), stop=stop, **more)
        assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == (cut, "stop")
        chunks = chat(server.client(), asked(DESCRIBE, url), stop=stop, stream=True, **more)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == cut


def test_errors_are_the_clients_own(server, url):
    client = server.client()
    with pytest.raises(openai.AuthenticationError, match="not accepted"):
        chat(server.client("sk-nobody-0123456789"), asked(COLOR, url))
    with pytest.raises(openai.NotFoundError, match="the model here is 'shapes'"):
        chat(client, asked(COLOR, url), model="gpt-4o")
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        chat(client, asked(COLOR, url), temperature=-1)
    assert caught.value.param == "temperature"
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="frequency_penalty"):  # not honoured, so not accepted
        chat(client, asked(COLOR, url), frequency_penalty=0.5)
    with pytest.raises(openai.BadRequestError, match="window"):
        chat(client, asked("what color is the star " * 300, url))
    with pytest.raises(openai.APIStatusError, match="at most 1,048,576 bytes") as large:
        chat(client, asked(COLOR, "data:image/png;base64," + "A" * 2_000_000))
    assert large.value.status_code == 413


def test_models(server):
    assert [one.id for one in server.client().models.list()] == ["shapes"]
    assert server.client().models.retrieve("shapes").owned_by == "mllm-fast"


def test_contexts_are_made_found_and_forgotten(server, url, sample, shapes):
    with server.http() as http:
        made = http.post("/v1/contexts", json={"images": [{"url": url}], "keep": 9, "score": "query"})
        assert made.status_code == 201
        ctx = shapes.compress(sample, 9, score="query")
        assert (made.json()["tokens"], made.json()["prefix_tokens"]) == (ctx.num_tokens, ctx.prefix_length)
        identity = made.json()["id"]
        assert identity in [one["id"] for one in http.get("/v1/contexts").json()["data"]]
        found = http.get(f"/v1/contexts/{identity}", params={"kept": True}).json()
        assert [layer["positions"] for layer in found["kept"]] == [ctx.kept(i).positions.tolist() for i in range(6)]
        assert found["images"] == [[96, 96]]
        reply = chat(server.client(), [{"role": "user", "content": COLOR}], extra_body={"context": identity})
        assert reply.choices[0].message.content == ctx.ask(COLOR).text
        assert reply.usage.prompt_tokens_details.cached_tokens == ctx.prefix_length
        # another key neither finds nor removes it, nor sees that the image was read
        with server.http(OTHER) as stranger:
            assert stranger.get(f"/v1/contexts/{identity}").status_code == 404
            assert stranger.delete(f"/v1/contexts/{identity}").status_code == 404
            assert stranger.get("/v1/contexts").json()["data"] == []
        with pytest.raises(openai.NotFoundError):
            chat(server.client(OTHER), [{"role": "user", "content": COLOR}], extra_body={"context": identity})
        theirs = chat(server.client(OTHER), asked(COLOR, url))
        assert theirs.usage.prompt_tokens_details.cached_tokens == 0
        assert http.delete(f"/v1/contexts/{identity}").json()["deleted"] is True
        assert http.get(f"/v1/contexts/{identity}").status_code == 404
        assert http.delete(f"/v1/contexts/{identity}").status_code == 404
        assert identity not in [one["id"] for one in http.get("/v1/contexts").json()["data"]]


def test_explanations(server, url, sample, shapes):
    ex = shapes.explain(sample, COLOR)
    with server.http() as http:
        body = {"messages": asked(COLOR, url)}
        found = http.post("/v1/explanations", json=body).json()
        assert found["answer"] == ex.text
        assert found["head_scores"][0][2] == pytest.approx(ex.head_scores[0, 2].tolist(), abs=1e-4)
        drawn = http.post("/v1/explanations", json=body | {"format": "png", "token": 0, "method": "attention"})
        assert drawn.headers["content-type"] == "image/png"
        assert drawn.content.startswith(b"\x89PNG")
        given = http.post("/v1/explanations", json=body | {"answer": "red", "knockout": ["image->query"]}).json()
        assert [token["text"] for token in given["tokens"]] == ["red"]
        assert http.post("/v1/explanations", json=body | {"format": "html"}).text.startswith("<!")
        for wrong in ({"method": "magic"}, {"token": 99}, {"knockout": ["image=>query"]}, {"answer": " "}):
            assert http.post("/v1/explanations", json=body | wrong).status_code == 400


def test_the_pages_own_examples_run(server, sample, tmp_path):
    """What docs/serving.md tells people to type, typed: by curl where it is there, and with OpenAI's client."""
    page = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()
    talk = page[page.index("## Talk to it") :]
    sample.save(tmp_path / "photo.png")
    here = talk.split("```sh\n")[1].split("```")[0].replace("http://127.0.0.1:8000", server.url)
    if shutil.which("curl"):
        line = here.replace("curl ", f"curl -s -H 'Authorization: Bearer {KEY}' ", 1)
        told = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=tmp_path, check=True).stdout
        assert json.loads(told)["choices"][0]["message"]["content"] == "blue"
    code = talk.split("```python\n")[1].split("```")[0].replace("http://127.0.0.1:8000", server.url)
    code = code.replace("one of keys.txt, or anything", KEY) + "\nclient.close()\n"
    told = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    ).stdout
    assert told.startswith("blue ")
    assert "star" in told


def test_health_metrics_and_the_api_page(server, url):
    assert httpx.get(f"{server.url}/healthz", timeout=HANG).text == "ok\n"
    assert httpx.get(f"{server.url}/readyz", timeout=HANG).status_code == 200
    before = server.metric("mllm_fast_answer_tokens_total")
    reply = chat(server.client(), asked(COLOR, url))
    assert server.metric("mllm_fast_answer_tokens_total") == before + reply.usage.completion_tokens
    assert server.metric("mllm_fast_contexts") > 0
    assert server.metric("mllm_fast_context_bytes") > 0
    assert (
        'mllm_fast_request_seconds_bucket{le="0.5",route="/v1/chat/completions",status="200"}'
        in httpx.get(f"{server.url}/metrics", timeout=HANG).text
    )
    assert "/v1/chat/completions" in httpx.get(f"{server.url}/openapi.json", timeout=HANG).json()["paths"]
    assert httpx.get(f"{server.url}/docs", timeout=HANG).status_code == 200


def test_the_log_tells_nobodys_secrets(server, url):
    chat(server.client(), asked("What color is the secret star?", url))
    httpx.get(f"{server.url}/v1/contexts/my-secret-name", params={"q": "secret"}, timeout=HANG)
    until(lambda: any('"prompt_tokens"' in line for line in server.raw))
    text = "".join(server.raw)
    for secret in (KEY, OTHER, "secret", url[30:60], "star"):
        assert secret not in text
    entries = [json.loads(line) for line in server.raw if line.startswith("{")]
    assert {"id", "method", "route", "status", "ms", "client"} <= set(entries[-1]) | set(entries[-2])


def long_answer(server, url, **options):
    return chat(server.client(), asked(DESCRIBE, url), **{"model": "endless", "max_tokens": 800, **options})


def refuses(server: served.Server) -> bool:
    """Whether it takes no connection any more."""
    try:
        httpx.get(f"{server.url}/healthz", timeout=HANG)
    except httpx.TransportError:
        return True
    return False


def idle(server) -> bool:
    """Nobody is answered, and nobody waits: a request that was given up may still be in the queue."""
    return not server.metric("mllm_fast_batch_rows") and not server.metric("mllm_fast_queue_depth")


def test_who_hangs_up_frees_the_place(endless, url):
    for stream in (False, True):
        before, handled = endless.metric("mllm_fast_decoded_tokens_total"), endless.handled()
        with httpx.Client(base_url=endless.url) as http:
            body = {"messages": asked(DESCRIBE, url), "max_tokens": 800, "stream": stream}
            if stream:
                with http.stream("POST", "/v1/chat/completions", json=body, timeout=HANG) as response:
                    next(response.iter_raw())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    http.post("/v1/chat/completions", json=body, timeout=httpx.Timeout(HANG, read=0.5))
        # it may be given up before it has got to the queue
        until(lambda handled=handled: endless.handled() > handled and idle(endless))
        assert endless.metric("mllm_fast_decoded_tokens_total") - before < 800  # it did not go on to the end


def test_who_reads_slowly_holds_nobody_up(endless, url):
    until(lambda: idle(endless))
    with httpx.Client(base_url=endless.url) as http:
        body = {"messages": asked(DESCRIBE, url), "max_tokens": 800, "stream": True}
        with http.stream("POST", "/v1/chat/completions", json=body, timeout=HANG):  # nothing is read
            first = chat(endless.client(), asked(COLOR, url), model="endless", max_tokens=5)
            assert first.usage.completion_tokens == 5
            # and its own answer is finished while nobody reads
            until(lambda: idle(endless))


def test_a_full_queue_is_told(endless, url):
    """Two in the batch, two in the queue: of twelve at once some are refused, with the time after which to come again,
    and the others are answered whole."""
    refused, done = [], []

    def ask():
        try:
            done.append(long_answer(endless, url, max_tokens=400))
        except openai.RateLimitError as error:
            refused.append(error)

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) + len(refused) == 12
    assert len(done) >= 2  # the queue had room for two before anybody was given a place
    assert all(reply.usage.completion_tokens == 400 for reply in done)
    assert refused
    assert refused[0].response.headers["Retry-After"] == "1"
    assert refused[0].code == "queue_full"


def test_a_signal_at_any_time_of_its_life_ends_it_well(tmp_path):
    """The first comes as soon as it listens, and more until the interpreter has ended."""
    server = served.Server(cwd=tmp_path)
    server.terminate()
    until(lambda: any('"stopped"' in line for line in server.raw))
    while server.process.poll() is None:
        server.terminate()
        time.sleep(0.002)
    assert server.stop() == 0


def test_stops_gracefully(tmp_path, url):
    """What runs is finished, what comes is refused, and the context is found by the next server."""
    model = served.endless(tmp_path / "model")
    options = ("--model", model, "--served-name", "endless", "--store", tmp_path / "store", *served.SLOW)
    first = served.Server(*options, cwd=tmp_path)
    began = time.monotonic()
    long_answer(first, url, max_tokens=100)
    pace = (time.monotonic() - began) / 100  # seconds a token, as busy as this machine is
    count = int(min(800, max(50, 5 / pace)))  # far less than what is finished within the server's 30 s
    before = first.metric("mllm_fast_decoded_tokens_total")
    answers = []
    thread = threading.Thread(target=lambda: answers.append(long_answer(first, url, max_tokens=count)))
    thread.start()
    until(lambda: first.metric("mllm_fast_decoded_tokens_total") > before)
    first.terminate()
    until(lambda: refuses(first))
    with pytest.raises(openai.APIConnectionError):
        long_answer(first, url)
    thread.join()
    assert answers[0].usage.completion_tokens == count
    assert first.stop() == 0
    second = served.Server(*options, cwd=tmp_path)
    try:
        reply = chat(second.client(), asked(COLOR, url), model="endless", max_tokens=1)
        assert reply.usage.prompt_tokens_details.cached_tokens > 0
    finally:
        second.stop()


def test_refuses_to_start_with_what_cannot_be(run, tmp_path):
    for options, words in (
        (("--port", 99999), "--port is 0 to 65535"),
        (("--keep", "7.5"), "keep"),
        (("--api-keys", tmp_path / "none"), "cannot be read"),
        (("--max-batch", 0), "max_batch is a positive number"),
    ):
        code, out, err = run("serve", *options)
        assert (code, out) == (2, "")
        assert words in err
    (tmp_path / "keys").write_text("short\n")
    assert "16 or more" in run("serve", "--api-keys", tmp_path / "keys")[2]


def test_the_packages_top_level_knows_nothing_of_it():
    assert not any("serving" in home for home in mf._HOME.values())


def test_half_a_character_is_sent_back_as_what_stands_for_it(server):
    """JSON can spell half of a character, which no encoding of text can; the model has answered by then."""
    body = b'{"input": "what ?", "metadata": {"a": "\\ud800"}, "max_output_tokens": 1}'
    with server.http() as http:
        reply = http.post("/v1/responses", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 200
    assert reply.json()["metadata"] == {"a": "?"}


def test_the_answer_and_the_log_are_known_by_one_id(server, url):
    with server.http() as http:
        reply = http.post("/v1/chat/completions", json={"messages": asked(COLOR, url)})
        other = http.post("/v1/responses", json={"input": "what ?", "max_output_tokens": 1})
    for one, mark in ((reply, "chatcmpl-"), (other, "resp_")):
        identity = one.headers["x-request-id"]
        assert one.json()["id"] == mark + identity
        until(lambda identity=identity: any(identity in line for line in server.raw))
