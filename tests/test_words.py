"""One word for one thing, wherever a user reads: signatures, `--help`, the OpenAPI document. The glossary in
docs/architecture.md has the words."""

from __future__ import annotations

import inspect
import json
import re
import warnings

import pytest
from typer.main import get_command

import mllm_fast as mf
from mllm_fast import kernels
from mllm_fast.cli.app import app
from mllm_fast.explain.scores import Scores
from mllm_fast.joint import JointModel
from mllm_fast.serving.schema import ChatRequest, ContextRequest, ExplanationRequest

# what was said before, and the word for it
BANNED = {
    "picture": "image",
    "pictures": "images",
    "watcher": "observer",
    "chooser": "sampler",
    "recipe": "spec",
    "mail": "queue",
    "token_values": "attribution",
    "image_values": "attribution",
}
PUBLIC = [getattr(mf, name) for name in mf.__all__] + [JointModel, Scores]


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z_]+", text.lower()))


def banned(text: str) -> dict[str, str]:
    return {word: BANNED[word] for word in words(text) & set(BANNED)}


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda thing: thing.__name__)
def test_signatures(thing):
    """Names of public methods and of their parameters."""
    for name, member in inspect.getmembers(thing):
        if (name.startswith("_") and name != "__init__") or name in dir(ValueError):
            continue
        text = name
        if callable(member):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                text += " " + " ".join(inspect.signature(member).parameters)
        assert not (set(re.findall(r"[a-z_]+", text)) & set(BANNED)), f"{thing.__name__}.{text}"


def commands(group, path=()):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


COMMANDS = dict(commands(get_command(app)))


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name):
    """No banned word, and no line that is a fragment after "Of"; an option's help begins with a capital letter."""
    command = COMMANDS[name]
    assert not banned(command.help)
    for parameter in command.params:
        text = parameter.help
        assert text, parameter.name
        assert not banned(f"{parameter.name} {text}"), f"{parameter.name}: {text}"
        assert not text.startswith("Of "), text


@pytest.mark.parametrize("schema", [ChatRequest, ContextRequest, ExplanationRequest], ids=lambda one: one.__name__)
def test_schema(schema):
    """The parts of the OpenAPI document that requests are made of."""
    assert not banned(json.dumps(schema.model_json_schema()))


def test_old_names_work_for_one_release(shapes, picture):
    ex = shapes.explain(picture, "what color is the star?")
    with pytest.warns(DeprecationWarning, match="token_values is called attribution now"):
        old = ex.token_values(0)
    assert (old == ex.attribution(0)).all()
    with pytest.warns(DeprecationWarning, match="norm is called final_norm now"):
        assert ex.norm == "frozen"
    with pytest.warns(DeprecationWarning, match=r"norm= of VLM.explain is called final_norm= now"):
        assert shapes.explain(picture, "what color is the star?", norm="own").final_norm == "own"
    ctx = shapes.compress(picture, keep=3, score="key_norm")
    with pytest.warns(DeprecationWarning, match="pictures is called canvases now"):
        assert ctx.pictures[0].size == picture.size
    with pytest.warns(DeprecationWarning, match="few_row_linear is called skinny_linear now"):
        assert kernels.few_row_linear is kernels.skinny_linear
    for thing, name in ((ex, "no_such_name"), (ctx, "no_such_name"), (kernels, "no_such_name")):
        with pytest.raises(AttributeError, match=name):
            getattr(thing, name)
