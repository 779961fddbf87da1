"""README and docs/ tell what is so: their figures come from the result files, their links and names exist, and their
examples run as they are printed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import yaml
from served import KEY, Server

import mllm_fast
from mllm_fast import cli, joint
from mllm_fast.core.assets import SAMPLE
from mllm_fast.explain.registry import HEATMAP_METHODS
from mllm_fast.shapes.scenes import generate_scene

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# the examples of these run in test_serving, test_extending and test_ten_tasks, and below with a server
ELSEWHERE = ("CONTRIBUTING.md", "serving.md", "extending.md", "benchmarks.md", "serve-and-chat.md", "ten-tasks.md")
RUN = [page for page in PAGES if page.name not in ELSEWHERE and page.parent.name != "reference"]


def printed(*arguments: str) -> str:
    command = [sys.executable, ROOT / "benchmarks" / "table.py", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_figures_come_from_the_result_files():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert printed() in page, "the page's figures are old: paste the output of `python benchmarks/table.py`"
    assert printed("headlines") in README, "README's figures are old: paste `python benchmarks/table.py headlines`"


def test_figures_of_the_servers_page_come_from_the_result_files():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import table
    finally:
        sys.path.pop(0)
    page = (ROOT / "docs" / "serving.md").read_text()
    for lines in (table.serving(table._result("serving")), table.sizes(table._result("reprompt"))):
        assert "\n".join(lines) in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target
    for name in re.findall(r"`(?:[a-z_]+/)+[a-z_0-9]+\.(?:py|cpp|h)`", text):
        inside = name.strip("`")
        assert (ROOT / inside).exists() or (ROOT / "mllm_fast" / inside).exists(), name


def test_readme_is_short_and_its_tree_is_the_packages():
    assert len(README.splitlines()) <= 220
    tree = README[README.index("## The house") :].split("```")[1]
    listed = re.findall(r"^  ([a-z]+/|[a-z_]+\.py) ", tree, re.MULTILINE)
    found = {f"{one.name}/" if one.is_dir() else one.name for one in (ROOT / "mllm_fast").iterdir()}
    assert set(listed) == found - {"__init__.py", "__pycache__/"}


def test_ci_runs_the_documented_command():
    block = README[README.index("<!-- test command -->") :].split("```")[1]
    assert block.split() == ["sh", "pip", "install", '".[test]"', "&&", "pytest"]


def test_the_glossary_is_short():
    page = (ROOT / "docs" / "architecture.md").read_text()
    words = re.findall(r"^- \*\*(.+?)\*\*: ", page[page.index("## Glossary") :], re.MULTILINE)
    assert 10 <= len(words) <= 25
    assert words == sorted(words)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the examples name: images, and a small model where the examples name a large one of its architecture."""
    monkeypatch.chdir(tmp_path)
    for name in HEATMAP_METHODS:  # a method that an example adds is gone after it
        HEATMAP_METHODS.get(name)
    monkeypatch.setattr(HEATMAP_METHODS, "_modules", dict(HEATMAP_METHODS._modules))
    monkeypatch.setattr(HEATMAP_METHODS, "_found", dict(HEATMAP_METHODS._found))
    (tmp_path / "photo.png").write_bytes(SAMPLE.read_bytes())
    (tmp_path / "photos").mkdir()
    for i, name in enumerate(("a.png", "b.png", "photos/c.png", "photos/d.png")):
        generate_scene(np.random.default_rng(i)).image.save(tmp_path / name)
    model, processor = tiny.llava()
    model.save_pretrained("llava-hf/llava-1.5-7b-hf")
    processor.save_pretrained("llava-hf/llava-1.5-7b-hf")
    return tmp_path


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_examples_run_as_printed(page, folder, monkeypatch):
    """Python blocks one after another in one namespace, and every command of the package itself."""
    names: dict = {}
    for language, block in re.findall(r"```(python|sh)\n(.*?)```", page.read_text(), re.DOTALL):
        if language == "python":
            exec(compile(block, page.name, "exec"), names)
            continue
        for line in block.replace("\\\n", "").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] != ["mllm-fast"]:
                continue
            monkeypatch.setattr(sys, "argv", words)
            with pytest.raises(SystemExit) as ended:
                cli.main()
            assert not ended.value.code, line


def test_the_servers_how_to_runs_as_printed(folder, monkeypatch, capsys):
    monkeypatch.setenv("MLLM_FAST_API_KEYS", KEY)
    server = Server(cwd=folder)
    try:
        page = (ROOT / "docs" / "howto" / "serve-and-chat.md").read_text().replace("http://127.0.0.1:8000", server.url)
        names: dict = {}
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
            exec(compile(block, "serve-and-chat.md", "exec"), names)
    finally:
        server.stop()
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == "blue 0"
    assert second.startswith("yes ")
    assert int(second.split()[1]) > 0
    assert (folder / "why.html").read_text().startswith("<!")


def test_the_site_has_every_page_once():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = re.findall(r"[\w/-]+\.(?:md|ipynb)", str(nav))
    docs = ROOT / "docs"
    pages = [*docs.rglob("*.md"), *docs.rglob("*.ipynb")]
    assert sorted(listed) == sorted(page.relative_to(docs).as_posix() for page in pages)


def test_the_reference_has_every_public_name():
    text = "".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)}
    assert {*mllm_fast.__all__, *joint.__all__} <= shown
