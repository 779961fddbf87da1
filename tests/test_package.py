"""What must stay true of the package as a whole."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mllm_fast

ROOT = Path(__file__).parent.parent


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/").stdout


def test_import_has_no_side_effects():
    out = run("import sys, mllm_fast; print([m for m in ('torch', 'triton', 'transformers') if m in sys.modules])")
    assert out.strip() == "[]"


def test_kernels_never_import_transformers():
    out = run("import sys, mllm_fast.kernels; print('transformers' in sys.modules, 'triton' in sys.modules)")
    assert out.strip() == "False False"
    for path in (ROOT / "kernels").rglob("*.py"):
        assert imports(path) <= {"torch", "numpy", "triton", *sys.stdlib_module_names}, path


def test_public_names():
    assert len(mllm_fast.__all__) <= 8
    for name in mllm_fast.__all__:
        assert getattr(mllm_fast, name).__doc__
    with pytest.raises(AttributeError, match="it has VLM"):
        _ = mllm_fast.vlm_


def test_op_is_a_function_however_it_was_imported():
    out = run(
        "import mllm_fast.kernels.logprob_increase\nfrom mllm_fast.kernels import logprob_increase as f; print(f)"
    )
    assert out.startswith("<function")


def test_versions_agree():
    assert f'version = "{mllm_fast.__version__}"' in (ROOT / "pyproject.toml").read_text()
