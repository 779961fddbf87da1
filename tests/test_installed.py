"""What README and docs print runs from the checkout's root after README's own install, editable or not: Python started
there finds the source tree first, whose kernels lie beside it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mllm_fast

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def documented() -> list[tuple[str, ...]]:
    """The programs that the documents name: scripts and modules for Python, and subcommands of `mllm-fast`."""
    found: set[tuple[str, ...]] = set()
    for text in (path.read_text() for path in DOCUMENTS):
        found |= {("python", one) for one in re.findall(r"python (benchmarks/\w+\.py)", text)}
        found |= {("python", "-m", one) for one in re.findall(r"python -m (mllm_fast[\w.]+\w)", text)}
        for listed in re.findall(r"`python benchmarks/` and (.*)", text):
            found |= {("python", f"benchmarks/{one}") for one in re.findall(r"`(\w+\.py)`", listed)}
        found |= {("mllm-fast", one) for one in re.findall(r"mllm-fast ([a-z]+(?:-[a-z]+)*)", text)}
        found |= {("mllm-fast", "joint", one) for one in re.findall(r"mllm-fast joint ([a-z]+(?:-[a-z]+)*)", text)}
    return sorted(found)


# Starts the programs in turn, each as Python starts it, with its own modules anew; torch is imported once for all.
STARTED = """
import contextlib, io, json, runpy, sys, traceback
path, wrong, given = list(sys.path), [], json.load(sys.stdin)
for command in given["commands"]:
    for name in [name for name, one in sys.modules.items()
                 if str(getattr(one, "__file__", None) or "").startswith(tuple(given["own"]))]:
        del sys.modules[name]
    program, first, *rest = command
    sys.path[:], out, code = path, io.StringIO(), 0
    with contextlib.redirect_stdout(out):
        try:
            if first == "-m":
                sys.argv = [rest[0], "--help"]
                runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
            elif program == "python":
                sys.argv = [first, "--help"]
                sys.path[0] = first.rpartition("/")[0]
                runpy.run_path(first, run_name="__main__")
            else:
                sys.argv = [given["script"], first, *rest, "--help"]
                runpy.run_path(given["script"], run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
        except BaseException:
            code = traceback.format_exc()
    if code or "sage:" not in out.getvalue():
        wrong.append(f"{command}: {code}, {out.getvalue()[-500:]}")
print("wrong: " + json.dumps(wrong))
"""


def test_what_the_documents_print_starts_from_the_root():
    commands = documented()
    assert ("python", "benchmarks/serving.py") in commands
    assert ("python", "-m", "mllm_fast.shapes.train") in commands
    assert ("mllm-fast", "explain") in commands
    own = [f"{ROOT / name}{os.sep}" for name in ("benchmarks", "tests")]
    given = {"commands": commands, "own": own, "script": str(Path(sys.executable).with_name("mllm-fast"))}
    done = subprocess.run(
        [sys.executable, "-c", STARTED], cwd=ROOT, input=json.dumps(given), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    wrong = json.loads(done.stdout.splitlines()[-1].removeprefix("wrong: "))
    assert not wrong, "\n".join(wrong)


def test_the_root_has_the_kernels_that_are_installed(tmp_path):
    command = [sys.executable, "-m", "mllm_fast.cli", "info", "--json"]
    here, elsewhere = (
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
        for folder in (ROOT, tmp_path)
    )
    assert here == elsewhere
    assert "knockout_attention" in here


@pytest.fixture
def checkout(tmp_path):
    """A folder with the package's first file and no kernels, as a checkout's root has it."""
    (tmp_path / "checkout" / "mllm_fast").mkdir(parents=True)
    shutil.copy(mllm_fast.__file__, tmp_path / "checkout" / "mllm_fast")
    return tmp_path / "checkout"


def run(code: str, folder: Path, path: Path) -> subprocess.CompletedProcess:
    """In an interpreter that has nothing installed but what lies in `path`."""
    command = [sys.executable, "-S", "-c", code]
    return subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(path)}, capture_output=True, text=True)


def test_a_checkout_runs_what_is_installed(checkout, tmp_path):
    kernels = tmp_path / "site" / "mllm_fast" / "kernels"
    kernels.mkdir(parents=True)
    (kernels / "__init__.py").write_text("BUILT = 1")
    (kernels.parent / "cli.py").write_text("from .kernels import BUILT\nprint('installed', BUILT)")
    (checkout / "mllm_fast" / "cli.py").write_text("print('the source tree')")
    done = run("import mllm_fast.cli", checkout, tmp_path / "site")
    assert done.stdout == "installed 1\n", done.stderr


def test_a_checkout_that_is_not_installed_says_so(checkout, tmp_path):
    done = run("import mllm_fast", checkout, tmp_path / "nothing")
    assert "pip install" in done.stderr
    assert str(checkout) in done.stderr
