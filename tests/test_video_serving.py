"""Videos over HTTP: `video_url` in messages and contexts, as vLLM takes them."""

from __future__ import annotations

import base64
import io
import json

import pytest
import served
from waiting import HANG

import mllm_fast as mf
from mllm_fast.core.assets import SAMPLE_VIDEO
from mllm_fast.serving.image_fetch import video_address
from mllm_fast.serving.messages import conversation
from mllm_fast.serving.schema import Message, VideoURL
from mllm_fast.serving.settings import Settings

START, END, KEY = "What color is the star at the start?", "What color is the star at the end?", served.KEY


def url(content: bytes, kind: str = "webp") -> str:
    return f"data:video/{kind};base64," + base64.b64encode(content).decode()


SAMPLE = url(SAMPLE_VIDEO.read_bytes())


def messages(question: str, address: str = SAMPLE, **choice: object) -> list:
    video = {"type": "video_url", "video_url": {"url": address, **choice}}
    return [{"role": "user", "content": [video, {"type": "text", "text": question}]}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    (folder / "keys").write_text(f"{KEY}\n")
    made = served.Server("--model", "clips", "--api-keys", folder / "keys", cwd=folder)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def clips():
    return mf.VLM.from_pretrained("clips")


@pytest.fixture
def http(server):
    with server.http() as client:
        yield client


def answer(http, question: str, **more: object) -> str:
    body = {"model": "clips", "messages": messages(question, **more.pop("choice", {})), **more}
    reply = http.post("/v1/chat/completions", json=body, timeout=HANG)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def test_answers_are_those_of_the_library(http, clips):
    video = mf.Video(SAMPLE_VIDEO)
    for question in (START, END):
        assert answer(http, question, keep="off") == clips.generate(video, question).text
        assert answer(http, question, keep=1.0) == clips.generate(video, question).text


def test_frames_are_chosen_in_the_request(http, clips):
    first = mf.Video(SAMPLE_VIDEO, num_frames=1)
    assert answer(http, END, keep="off", choice={"num_frames": 1}) == clips.generate(first, END).text
    assert clips.generate(first, END).text != clips.generate(mf.Video(SAMPLE_VIDEO), END).text


def test_a_stream_and_the_client_of_openai(server, clips):
    said = server.client().chat.completions.create(
        model="clips", messages=messages(END), stream=True, extra_body={"keep": "off"}
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in said if chunk.choices)
    assert text.strip() == clips.generate(mf.Video(SAMPLE_VIDEO), END).text


def test_a_context_of_a_video(http):
    made = http.post("/v1/contexts", json={"videos": [{"url": SAMPLE}], "keep": 1.0}, timeout=HANG)
    assert made.status_code == 201, made.text
    named = made.json()["id"]
    body = {"model": "clips", "messages": [{"role": "user", "content": START}], "context": named}
    found = http.post("/v1/chat/completions", json=body, timeout=HANG).json()
    assert found["choices"][0]["message"]["content"] == answer(http, START, keep=1.0)


def test_a_budget_for_each_frame(http, clips):
    """The tokens that the server keeps are those that the library keeps, as many of each frame."""
    body = {"videos": [{"url": SAMPLE}], "keep": 3, "score": "query"}
    for budget, more in (("all", {}), ("frame", {"budget": "frame"})):
        made = http.post("/v1/contexts", json=body | more, timeout=HANG).json()
        kept = http.get(f"/v1/contexts/{made['id']}?kept=true").json()["kept"]
        wanted = clips.compress(mf.Video(SAMPLE_VIDEO), 3, score="query", budget=budget)
        assert made["budget"] == budget
        assert made["tokens"] == wanted.num_tokens
        assert [one["positions"] for one in kept] == [
            wanted.kept(layer).positions.tolist() for layer in range(len(kept))
        ]
    refused = http.post("/v1/contexts", json=body | {"budget": "second"}, timeout=HANG)
    assert refused.status_code == 400
    assert "'all' or 'frame'" in refused.json()["error"]["message"]


def test_an_explanation_of_a_video(http):
    body = {"model": "clips", "messages": messages(END), "format": "json"}
    found = http.post("/v1/explanations", json=body, timeout=HANG)
    assert found.status_code == 200, found.text
    images = json.loads(found.content)["images"]
    assert [one["moment"]["frames"] for one in images] == [[i] for i in range(8)]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (url(b"no video at all"), "not a video in MP4"),
        (url(b"#EXTM3U\nhttp://10.0.0.1/x.ts"), "not a video in MP4"),
        (url(b"\x00\x00\x00\x18ftypmp42" + bytes(64)), "damaged or truncated"),
        ("data:image/png;base64,AAAA", "a data URL of a video"),
        ("https://example.org/a.mp4", "switched off here"),
        (url(b"!"), "not a video in MP4"),
    ],
)
def test_bad_videos_are_refused_in_one_line(http, address, words):
    reply = http.post("/v1/chat/completions", json={"model": "clips", "messages": messages(END, address)}, timeout=HANG)
    assert reply.status_code == 400
    message = reply.json()["error"]["message"]
    assert words in message
    assert "\n" not in message


def test_a_video_with_too_many_frames(http):
    from PIL import Image

    frames = [Image.new("RGB", (8, 8), (i % 256, i // 256, 0)) for i in range(300)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=10)
    body = {"model": "clips", "messages": messages(END, url(buffer.getvalue(), "gif"), num_frames=300)}
    reply = http.post("/v1/chat/completions", json=body, timeout=HANG)
    assert reply.status_code == 400
    assert "300 frames of the video would be read, the limit is 128" in reply.json()["error"]["message"]


def test_what_a_request_may_say():
    given = [Message.model_validate(one) for one in messages(END, num_frames=4)]
    found = conversation(given, Settings())
    assert found.urls == (SAMPLE,)
    assert found.urls[0].num_frames == 4
    other = conversation([Message.model_validate(one) for one in messages(END, num_frames=5)], Settings())
    assert found.digests != other.digests
    with pytest.raises(ValueError, match="num_frames or fps"):
        VideoURL(url=SAMPLE, num_frames=1, fps=2)
    assert video_address(VideoURL(url=SAMPLE, fps=2)).fps == 2
