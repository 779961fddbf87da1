"""Answers that follow a schema: by a tiny model whose vocabulary is bytes, with the logits of nobody in mind."""

from __future__ import annotations

import asyncio
import json
import resource
import subprocess

import jsonschema
import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import mllm_fast as mf
from mllm_fast.serving.errors import ServiceError
from mllm_fast.serving.schema import ChatRequest
from mllm_fast.serving.service import Service
from mllm_fast.serving.settings import Settings

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "color": {"enum": ["red", "green", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
        "names": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
    },
    "required": ["color", "count", "names"],
    "additionalProperties": False,
}


def byte_tokenizer():
    """A token for each byte, and the few that the templates need."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={one: i for i, one in enumerate([*special, *letters])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )
    made.add_tokens(special, special_tokens=True)
    return made


@pytest.fixture(scope="module")
def vlm():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "tokenizer", lambda *_, **__: byte_tokenizer())
        return mf.VLM(*tiny.llava())


def answers(vlm: mf.VLM, *requests: dict) -> list[str]:
    """The answers to requests that are decoded together."""

    async def run() -> list[str]:
        service = Service(vlm, Settings(max_tokens=300))
        await service.start()

        async def one(request: dict) -> str:
            body = {"messages": [{"role": "user", "content": "what ?"}], "max_tokens": 300, **request}
            chunks = await service.chat(ChatRequest.model_validate(body))
            return "".join([chunk.text async for chunk in chunks])

        try:
            return list(await asyncio.gather(*(one(request) for request in requests)))
        finally:
            await asyncio.to_thread(service.stop)

    return asyncio.run(run())


def of_schema(schema: dict, **more) -> dict:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}, **more}


def test_answers_follow_their_schema(vlm):
    """Greedy and sampled, beside answers without one, which are as ever."""
    requests = [of_schema(SCHEMA), *(of_schema(SCHEMA, temperature=1.0, seed=i) for i in range(4)), {"max_tokens": 20}]
    *found, plain = answers(vlm, *requests)
    for text in found:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(set(found)) > 1
    assert plain == answers(vlm, {"max_tokens": 20})[0]


def test_an_answer_that_is_cut_begins_an_object(vlm):
    (found,) = answers(vlm, {"response_format": {"type": "json_object"}, "max_tokens": 5})
    assert found.startswith("{")
    assert answers(vlm, {"response_format": {"type": "text"}, "max_tokens": 5}) == answers(vlm, {"max_tokens": 5})


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (of_schema({"type": "nothing"}), "cannot be followed"),
        (of_schema({"$ref": "https://elsewhere.test/a.json"}), "cannot be followed"),
        (of_schema({"enum": ["a" * 70_000]}), "at most 65,536 characters"),
    ],
)
def test_schemas_that_cannot_be_followed(vlm, wanted, message):
    with pytest.raises(ServiceError, match=message) as caught:
        answers(vlm, wanted)
    assert (caught.value.status, caught.value.param) == (400, "response_format")


def test_a_vocabulary_without_json(shapes):
    with pytest.raises(ServiceError, match=r"cannot be followed|vocabulary cannot write") as caught:
        answers(shapes, {**of_schema(SCHEMA), "messages": [{"role": "user", "content": "what ?"}]})
    assert caught.value.status == 400


def test_a_schema_that_grows_without_end(vlm):
    """Patterns that must all match take exponential time and memory; the server itself spends none on them."""
    patterns = {"type": "string", "allOf": [{"pattern": f".*{chr(97 + i)}.*"} for i in range(20)]}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ServiceError, match="too much time or memory") as caught:
        answers(vlm, of_schema(patterns))
    assert caught.value.status == 400
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < 256 << 20


def test_only_verdicts_about_a_schema_are_remembered(monkeypatch):
    """A machine that was busy, or a checker that could not run, says nothing about the schema."""
    from mllm_fast.serving import schema_check, structured

    def late(*_, **__):
        raise subprocess.TimeoutExpired("check", 1.0)

    def broken(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "ImportError: no such library")

    made = structured.Constraints(None, [2], 8)
    right = subprocess.run
    for run, error in ((late, TimeoutError), (broken, RuntimeError)):
        monkeypatch.setattr(schema_check.subprocess, "run", run)
        with pytest.raises(error):
            made._error('{"type": "string"}')
    monkeypatch.setattr(schema_check.subprocess, "run", right)
    assert made._error('{"type": "string"}') == ""
    assert "nothing" in made._error('{"type": "nothing"}')
