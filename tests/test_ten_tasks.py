"""A new user's ten tasks: each is at most six lines of the documentation, which run as they are printed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from waiting import HANG

from mllm_fast import cli
from mllm_fast.core.assets import SAMPLE, SHAPES_WEIGHTS
from mllm_fast.explain.registry import HEATMAP_METHODS

PAGE = (Path(__file__).parent.parent / "docs" / "howto" / "ten-tasks.md").read_text()
FOUND = re.findall(r"^## ([^\n]+)\n.*?```(python|sh)\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
TASKS = {title: (language, block) for title, language, block in FOUND}
PYTHON = [title for title, (language, _) in TASKS.items() if language == "python"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A picture, and a folder of a LLaVA model."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(SAMPLE, "photo.png")
    shutil.copytree(SHAPES_WEIGHTS, "my-llava")
    for name in HEATMAP_METHODS:  # a method that a task adds is gone after it
        HEATMAP_METHODS.get(name)
    monkeypatch.setattr(HEATMAP_METHODS, "_modules", dict(HEATMAP_METHODS._modules))
    monkeypatch.setattr(HEATMAP_METHODS, "_found", dict(HEATMAP_METHODS._found))
    return tmp_path


def test_there_are_ten_of_at_most_six_lines():
    assert len(TASKS) == len(re.findall(r"^## ", PAGE, re.MULTILINE)) == 10
    for title, (_, block) in TASKS.items():
        assert len([line for line in block.splitlines() if line]) <= 6, title


@pytest.mark.parametrize("title", PYTHON)
def test_tasks_in_python(title, folder, capsys):
    exec(compile(TASKS[title][1], title, "exec"), {})
    said = capsys.readouterr().out
    expected = {
        "Explain a photo": ("blue", ["why.html"]),
        "Why not another word?": ("(1, ", ["why-not.png"]),
        "Compare two methods": ("rollout", ["logprob.png", "rollout.png"]),
        "Compress a picture, and ask ten questions": ("yes\n", []),
        "Write a heatmap method": ("", ["own.png"]),
    }
    words, files = expected[title]
    assert words in said
    for name in files:
        assert Path(name).stat().st_size > 1000
        if name.endswith(".png"):
            with Image.open(name) as drawn:
                assert drawn.width > 400
    if title.startswith("Compress"):
        assert len(said.splitlines()) == 10


def shell(block: str, folder: Path) -> str:
    """Run lines of a shell, with the package's command and without a browser; the port is one that is free."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "BROWSER": "echo"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-m", "-c", block.replace("8000", str(port)) + "\nwait"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    return done.stdout


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="the lines call curl")


def commands(block: str, monkeypatch) -> None:
    """Run lines that are each a command of the package."""
    for line in block.splitlines():
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code, line


def test_install(folder, monkeypatch, capsys):
    first, rest = TASKS["Install"][1].split("\n", 1)
    assert re.fullmatch(r'pip install "\.\[[a-z,]+\]"', first)  # .ci/run installs the checkout so
    commands(rest, monkeypatch)
    assert "knockout_attention" in capsys.readouterr().out


def test_knock_out_and_chart(folder, monkeypatch, capsys):
    commands(TASKS["Knock attention out, and draw a chart"][1], monkeypatch)
    assert "image->query" in capsys.readouterr().out
    with Image.open("chart.png") as drawn:
        assert drawn.width > 400


@needs_curl
def test_serve_and_chat(folder):
    said = shell(TASKS["Serve, and chat"][1], folder)
    assert '"role":"assistant"' in said.replace(" ", "")


@needs_curl
def test_the_tool(folder):
    pytest.importorskip("gradio")
    assert "/ui" in shell(TASKS["Use the tool in the browser"][1], folder)


def test_a_papers_figure(folder, monkeypatch):
    commands(TASKS["Draw a paper's figure"][1], monkeypatch)
    assert list((folder / "figures").rglob("*.png"))
