"""The Triton kernels' numbers: the cases of tests/interpreted, in Triton's interpreter; on a GPU there too.

The interpreter is chosen before Triton is imported, so the cases have a process of their own.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
CASES = sorted(HERE.glob("interpreted/cases_*.py"))

if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    pytest.skip("triton is a dependency on Linux x86_64 only", allow_module_level=True)


def run_cases(file: Path, interpret: bool) -> subprocess.CompletedProcess:
    # some cases ask torch for its deterministic mode, which cuBLAS has with this setting
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    fixed = {"TRITON_INTERPRET": str(int(interpret)), "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONPATH": path}
    fixed["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # they use none, and loading them takes seconds
    environment = os.environ | fixed
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--confcutdir={file.parent}", str(file)]
    return subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def runs(request):
    """What `run_cases` gives for the files that are asked for, as many at a time as there are cores."""
    from triton_aot import selected

    ways = {"test_interpreted": True} | ({"test_on_gpu": False} if torch.cuda.is_available() else {})
    wanted = [(given["file"], ways[test]) for test, given in selected(request, *ways)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = {case: pool.submit(run_cases, *case) for case in wanted}
        yield lambda *case: made[case].result()


def check(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, f"\n{done.stdout}{done.stderr}"
    assert " skipped" not in done.stdout, done.stdout


@pytest.mark.parametrize("file", CASES, ids=lambda f: f.stem)
def test_interpreted(runs, file):
    check(runs(file, True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("file", CASES, ids=lambda f: f.stem)
def test_on_gpu(runs, file):
    check(runs(file, False))
