"""Why an answer ended, wherever answers are: by the model, by the largest number of tokens, or given."""

from __future__ import annotations

import json

import pytest

from mllm_fast.core.assets import SAMPLE

SHORT, LONG = "What color is the star?", "Describe the image."


@pytest.mark.parametrize(
    ("question", "most", "reason"), [(SHORT, 32, "stop"), (SHORT, 1, "length"), (LONG, 3, "length"), (LONG, 64, "stop")]
)
def test_all_ways_agree(shapes, question, most, reason):
    options = {"max_new_tokens": most}
    assert shapes.generate(SAMPLE, question, **options).finish_reason == reason
    assert shapes.generate([SAMPLE, SAMPLE], [question, LONG], **options)[0].finish_reason == reason
    assert shapes.explain(SAMPLE, question, **options).finish_reason == reason
    with shapes.stream(SAMPLE, question, **options) as stream:
        seen = []
        for _ in stream:
            seen.append(stream.answer.finish_reason)
        assert stream.answer.finish_reason == reason
    assert set(seen[:-1]) <= {None}
    ctx = shapes.compress(SAMPLE, keep=1.0)
    assert ctx.ask(question, **options).finish_reason == reason
    assert ctx.ask_many([question, SHORT], **options)[0].finish_reason == reason
    assert ctx.explain(question, **options).finish_reason == reason
    chat = ctx.chat()
    assert chat.ask(question, **options).finish_reason == reason
    with ctx.stream(question, **options) as stream:
        for _ in stream:
            pass
        assert stream.answer.finish_reason == reason


def test_given_answers_and_streams_that_are_left(shapes):
    assert shapes.explain(SAMPLE, SHORT, "red").finish_reason is None
    assert shapes.compress(SAMPLE).explain(SHORT, "red").finish_reason is None
    with shapes.stream(SAMPLE, LONG, max_new_tokens=32) as stream:
        next(stream)
    assert stream.answer.finish_reason is None


def test_the_command_line_tells(run, tmp_path):
    for command in (["generate"], ["explain"]):
        _, out, err = run(*command, SAMPLE, "-q", LONG, "--max-new-tokens", "3")
        assert "the answer was cut at 3 tokens; --max-new-tokens gives more" in err
        _, out, err = run(*command, SAMPLE, "-q", SHORT)
        assert "cut" not in err
        _, out, _ = run(*command, SAMPLE, "-q", LONG, "--max-new-tokens", "3", "--json")
        assert json.loads(out)["finish_reason"] == "length"
    run("compress", SAMPLE, "--out", tmp_path / "a.safetensors")
    _, out, err = run("ask", tmp_path / "a.safetensors", LONG, SHORT, "--max-new-tokens", "3")
    assert "1 of 2 answers were cut at 3 tokens" in err
    run("explain", SAMPLE, "-q", LONG, "--max-new-tokens", "3", "--out", tmp_path / "a.html")
    assert '"cut": true' in (tmp_path / "a.html").read_text()
