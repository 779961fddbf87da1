"""The Triton kernels' numbers: the cases of tests/interpreted, in Triton's interpreter; on a GPU there too.

The interpreter is chosen before Triton is imported, so the cases have a process of their own.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
CASES = sorted(HERE.glob("interpreted/cases_*.py"))

if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    pytest.skip("triton is a dependency on Linux x86_64 only", allow_module_level=True)


def run_cases(file: Path, interpret: bool) -> None:
    # some cases ask torch for its deterministic mode, which cuBLAS has with this setting
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    fixed = {"TRITON_INTERPRET": str(int(interpret)), "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONPATH": path}
    environment = os.environ | fixed
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--confcutdir={file.parent}", str(file)]
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"\n{done.stdout}{done.stderr}"
    assert " skipped" not in done.stdout, done.stdout


@pytest.mark.parametrize("file", CASES, ids=lambda f: f.stem)
def test_interpreted(file):
    run_cases(file, interpret=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("file", CASES, ids=lambda f: f.stem)
def test_on_gpu(file):
    run_cases(file, interpret=False)
