"""The house stays as it is drawn: who imports whom, how large its parts are, what lies in it."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mllm_fast"
CONFIG = (ROOT / "pyproject.toml").read_text()
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def lint(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = Path(sys.executable).with_name("lint-imports")
    return subprocess.run([command, "--no-cache", *options], cwd=folder, capture_output=True, text=True)


def test_contracts():
    done = lint(ROOT)
    assert "3 kept, 0 broken" in done.stdout, done.stdout + done.stderr


def test_contracts_hold_for_imports_of_types_as_well(tmp_path):
    """In an installed package, where `kernels` lies inside: there grimp sees every import for what it is."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.safetensors")
    shutil.copytree(PACKAGE, tmp_path / "mllm_fast", ignore=ignore)
    shutil.copytree(ROOT / "kernels", tmp_path / "mllm_fast" / "kernels", ignore=ignore)
    config = CONFIG[CONFIG.index("[tool.importlinter]") :]
    for before, after in (
        (r"root_packages = .*", 'root_packages = ["mllm_fast"]'),
        (r"exclude_type_checking_imports = true", "exclude_type_checking_imports = false"),
        (r"exhaustive = true", 'exhaustive = true\nexhaustive_ignores = ["kernels"]'),
        (
            r'source_modules = \["kernels"\]\nforbidden_modules = \["mllm_fast", "transformers"\]',
            'source_modules = ["mllm_fast.kernels"]\nforbidden_modules = ["mllm_fast.core", "transformers"]',
        ),
        (r'ancestors = \["mllm_fast", "kernels"\]', 'ancestors = ["mllm_fast"]'),
    ):
        config, count = re.subn(before, after, config)
        assert count == 1, before
    (tmp_path / "pyproject.toml").write_text(config)
    done = lint(tmp_path)
    assert "3 kept, 0 broken" in done.stdout, done.stdout + done.stderr


def test_an_import_upwards_breaks_a_contract(tmp_path):
    """The linter looks at what it should: one line in the wrong room, and it says where."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.safetensors")
    shutil.copytree(PACKAGE, tmp_path / "mllm_fast", ignore=ignore)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=ignore)
    (tmp_path / "pyproject.toml").write_text(CONFIG)
    path = tmp_path / "mllm_fast" / "core" / "files.py"
    path.write_text(path.read_text() + "\n\ndef late():\n    from ..vlm import VLM\n\n    return VLM\n")
    done = lint(tmp_path)
    assert "mllm_fast.core is not allowed to import mllm_fast.vlm" in " ".join(done.stdout.split())


def test_no_import_is_ignored():
    assert "ignore_imports" not in CONFIG


def test_packages_are_the_folders():
    listed = re.search(r"^packages = \[(.*?)\]", CONFIG, re.DOTALL | re.MULTILINE)
    assert listed
    named = set(re.findall(r'"([\w.]+)"', listed[1]))
    folders = {".".join(p.parent.relative_to(ROOT).parts) for p in SOURCES if p.name == "__init__.py"}
    assert named == {f"mllm_fast.{one}" if one.startswith("kernels") else one for one in folders}


def test_the_package_shows_its_rooms():
    """The rooms, the facade and the public names: at most 14 things, beside the door of `python -m mllm_fast`."""
    seen = {path.name for path in PACKAGE.iterdir()} - {"__pycache__", "__main__.py"}
    assert len(seen) <= 14, sorted(seen)


def functions(tree: ast.AST):
    return [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def said_why(lines: list[str], node: ast.AST) -> bool:
    """Whether the signature has a comment that says why the thing is long."""
    return any("# long: " in line for line in lines[node.lineno - 1 : node.body[0].lineno])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_and_classes_stay_small(path):
    """At most 60 lines a function, its docstring not counted, and 15 methods a class, unless a comment says why."""
    text = path.read_text()
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            methods = [one for one in node.body if isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef))]
            methods = [one for one in methods if "overload" not in map(ast.unparse, one.decorator_list)]
            assert len(methods) <= 15 or said_why(lines, node), f"class {node.name} has {len(methods)} methods"
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            described = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
            length = node.end_lineno - node.lineno + 1 - described
            assert length <= 60 or said_why(lines, node), f"{node.name} has {length} lines"
