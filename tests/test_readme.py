"""README tells what the files tell: its figures, its commands, its tree."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_figures_come_from_the_result_files():
    printed = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "table.py"], check=True, capture_output=True, text=True
    ).stdout.strip()
    assert printed in README, "README's figures are old: paste the output of `python benchmarks/table.py`"


def test_figures_of_the_servers_page_come_from_the_result_files():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import table
    finally:
        sys.path.pop(0)
    page = (ROOT / "docs" / "serving.md").read_text()
    for lines in (table.serving(table._result("serving")), table.sizes(table._result("reprompt"))):
        assert "\n".join(lines) in page


def test_links_and_files_exist():
    for page in (ROOT / "README.md", ROOT / "docs" / "serving.md"):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), target
    tree = README[README.index("## The house") :]
    for name in re.findall(r"[a-z_]+\.(?:py|cpp|h)\b", tree):
        assert list(ROOT.rglob(name)), name


def test_ci_runs_the_documented_command():
    block = README[README.index("<!-- test command -->") :].split("```")[1]
    assert block.split() == ["sh", "pip", "install", '".[test]"', "&&", "pytest"]


def test_files_stay_short():
    for path in [*ROOT.glob("mllm_fast/**/*.py"), *ROOT.glob("kernels/**/*"), *ROOT.glob("tests/*.py")]:
        if path.suffix in (".py", ".cpp", ".h"):
            assert len(path.read_text().splitlines()) <= 420, path
