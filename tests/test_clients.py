"""The clients that people have: chat, stream, turns with the reply sent back, errors; each with the real server."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
from pathlib import Path

import httpx
import openai
import pytest
import served
from PIL import Image
from served import KEY, asked

from mllm_fast.core.assets import SAMPLE

QUESTION, NEXT = "What color is the star?", "Is there a ring?"


@pytest.fixture(scope="module", autouse=True)
def _connections_are_closed():
    """Some of these libraries keep their connections for as long as the process lives, and warn when it ends."""
    yield
    for one in gc.get_objects():
        if issubclass(type(one), httpx.Client):
            one.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clients")
    (folder / "keys").write_text(f"{KEY}\n")
    made = served.Server("--api-keys", folder / "keys", cwd=folder)
    yield made
    assert not any('"status": 500' in line or "Traceback" in line for line in made.raw)
    made.stop()


@pytest.fixture(scope="module")
def url():
    return served.data_url(Image.open(SAMPLE).convert("RGB"))


def test_openai_sends_its_reply_back(server, url):
    client = server.client()
    first = client.chat.completions.create(model="shapes", messages=asked(QUESTION, url))
    assert first.choices[0].message.content == "blue"
    for said in (first.choices[0].message, first.choices[0].message.model_dump()):
        messages = [*asked(QUESTION, url), said, {"role": "user", "content": NEXT}]
        assert client.chat.completions.create(model="shapes", messages=messages).choices[0].message.content == "yes"


def test_openai_is_told_what_has_no_effect(server, url):
    raw = server.client().chat.completions.with_raw_response.create(
        model="shapes", messages=asked(QUESTION, url), reasoning_effort="low", user="somebody", store=False
    )
    assert raw.headers["x-ignored-parameters"] == "user, store, reasoning_effort"
    plain = server.client().chat.completions.with_raw_response.create(model="shapes", messages=asked(QUESTION, url))
    assert "x-ignored-parameters" not in plain.headers


def test_openai_asks_for_several_answers(server, url):
    client = server.client()
    options = {"model": "shapes", "messages": asked("Describe the image.", url), "temperature": 1.5, "seed": 4}
    alone = [client.chat.completions.create(**options | {"seed": 4 + i}).choices[0].message.content for i in range(3)]
    found = client.chat.completions.create(**options, n=3)
    assert [one.message.content for one in found.choices] == alone
    assert [one.index for one in found.choices] == [0, 1, 2]
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    texts, usage = ["", "", ""], None
    for chunk in client.chat.completions.create(**options, n=3, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for one in chunk.choices:
            texts[one.index] += one.delta.content or ""
    assert texts == alone
    assert usage.completion_tokens == found.usage.completion_tokens


def test_openai_gets_tokens_that_join(server, url):
    for stop in (None, ["white"]):
        reply = server.client().chat.completions.create(
            model="shapes",
            messages=asked("Describe the image.", url),
            logprobs=True,
            top_logprobs=2,
            stop=stop,
        )
        choice = reply.choices[0]
        assert len(choice.logprobs.content) > 3
        assert b"".join(bytes(one.bytes) for one in choice.logprobs.content).decode() == choice.message.content
        assert "".join(one.token for one in choice.logprobs.content) == choice.message.content


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 5}, "temperature"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "data:x"}]}]},
         "messages[0].content[0].image_url"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"keep": "all"}, "keep"),
        ({"stop": [1]}, "stop[0]"),
        ({"top_logprobs": 3}, None),
    ],
)  # fmt: skip
def test_errors_name_the_field(server, url, change, param):
    with server.http() as http:
        reply = http.post("/v1/chat/completions", json={"messages": asked(QUESTION, url)} | change)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param
    assert "union" not in reply.text
    assert "constrained" not in reply.text


def test_what_other_clients_send(server, url):
    """Nulls, pictures without a text, an assistant that opens, data URLs as browsers take them."""
    import base64

    content = SAMPLE.read_bytes()
    plain = base64.b64encode(content).decode()
    urls = [
        "data:image/png;base64," + plain.rstrip("="),
        " data:image/png;base64," + plain.replace("+", "%2B").replace("/", "%2F"),
        "data:;base64," + base64.urlsafe_b64encode(content).decode(),
        "data:application/octet-stream;base64," + plain + "#a-fragment",
        "data:image/png;charset=utf-8;base64," + plain[:100] + "\n" + plain[100:],
    ]
    with server.http() as http:

        def ask(**body) -> str:
            reply = http.post("/v1/chat/completions", json=body)
            assert reply.status_code == 200, reply.text
            return reply.json()["choices"][0]["message"]["content"]

        for one in urls:
            assert ask(messages=asked(QUESTION, one)) == "blue"
        nulls = dict.fromkeys(("temperature", "tools", "functions", "audio", "web_search_options", "n", "stop"))
        assert ask(messages=asked(QUESTION, url), **nulls) == "blue"
        alone = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url, "detail": None}}]}]
        assert "ring" in ask(messages=alone)
        assert ask(messages=[{"role": "assistant", "content": "How can I help?"}, *asked(QUESTION, url)]) == "blue"


def test_openai_s_responses(server, url):
    client = server.client()
    content = [{"type": "input_image", "image_url": url, "detail": "auto"}, {"type": "input_text", "text": QUESTION}]
    asks = [{"role": "user", "content": content}]
    first = client.responses.create(model="shapes", input=asks, instructions="Be short.")
    assert first.output_text == "blue"
    assert first.status == "completed"
    assert first.usage.total_tokens == first.usage.input_tokens + first.usage.output_tokens
    more = [*asks, *[one.model_dump() for one in first.output], {"role": "user", "content": NEXT}]
    assert client.responses.create(model="shapes", input=more).output_text == "yes"
    reference = {"type": "item_reference", "id": first.output[0].id}
    more = [*asks, reference, {"role": "user", "content": NEXT}]
    assert client.responses.create(model="shapes", input=more).output_text == "yes"
    gone = client.responses.create(model="shapes", input=asks, store=False).output[0].id
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="shapes", input=[*asks, {"type": "item_reference", "id": gone}, more[-1]])
    with client.responses.stream(model="shapes", input=asks) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == "blue"
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    short = client.responses.create(
        model="shapes",
        input=[{"role": "user", "content": [content[0], {"type": "input_text", "text": "Describe the image."}]}],
        max_output_tokens=2,
    )
    assert short.status == "incomplete"
    assert short.incomplete_details.reason == "max_output_tokens"
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="shapes", input=asks, previous_response_id="resp_1")
    assert caught.value.param == "previous_response_id"


def test_langchain(server, url):
    langchain = pytest.importorskip("langchain_openai")
    for responses in (False, True):
        model = langchain.ChatOpenAI(
            model="shapes", base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, use_responses_api=responses
        )
        messages = asked(QUESTION, url)
        first = model.invoke(messages)
        assert first.text == "blue"
        assert model.invoke([*messages, first, {"role": "user", "content": NEXT}]).text == "yes"
        assert "".join(chunk.text for chunk in model.stream(messages)) == "blue"
    with pytest.raises(openai.BadRequestError):
        model.bind(temperature=5).invoke(messages)


@pytest.mark.filterwarnings("ignore")
def test_litellm(server, url, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it asks a host on the network otherwise
    litellm = pytest.importorskip("litellm")
    options = {"model": "openai/shapes", "api_base": f"{server.url}/v1", "api_key": KEY, "num_retries": 0}
    messages = asked(QUESTION, url)
    first = litellm.completion(messages=messages, **options)
    assert first.choices[0].message.content == "blue"
    more = [*messages, first.choices[0].message, {"role": "user", "content": NEXT}]
    assert litellm.completion(messages=more, **options).choices[0].message.content == "yes"
    parts = litellm.completion(messages=messages, stream=True, **options)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == "blue"
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(messages=messages, temperature=5, **options)


def test_llama_index(server, url):
    pytest.importorskip("llama_index.llms.openai_like")
    from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
    from llama_index.llms.openai_like import OpenAILike

    model = OpenAILike(
        model="shapes", api_base=f"{server.url}/v1", api_key=KEY, is_chat_model=True, max_retries=0, context_window=1024
    )
    asks = [ChatMessage(role="user", blocks=[ImageBlock(url=url), TextBlock(text=QUESTION)])]
    first = model.chat(asks)
    assert first.message.content == "blue"
    assert model.chat([*asks, first.message, ChatMessage(role="user", content=NEXT)]).message.content == "yes"
    assert [part.message.content for part in model.stream_chat(asks)][-1] == "blue"
    with pytest.raises(openai.BadRequestError):
        model.chat(asks, temperature=5)


def test_node(server, url, tmp_path_factory):
    """OpenAI's client for node, and Vercel's AI SDK."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if not npm or not node:
        pytest.skip("there is no node here")
    folder = tmp_path_factory.mktemp("node")
    install = [npm, "install", "--silent", "--no-audit", "--no-fund", "openai", "ai", "@ai-sdk/openai"]
    try:
        made = subprocess.run(install, cwd=folder, capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        pytest.skip("npm's registry does not answer")
    if made.returncode and not (folder / "node_modules" / "ai").exists():
        pytest.skip(f"npm's registry is not reached: {made.stderr[-200:]}")
    (folder / "url.txt").write_text(url)
    script = Path(__file__).parent / "clients.mjs"
    ran = subprocess.run(
        [node, script, server.url, KEY, folder / "url.txt", folder], capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found.pop("error") == [400, "temperature"]
    for name, answer in found.items():
        assert answer == ("yes" if name in ("next", "stream") or name.endswith("_next") else "blue"), name
