"""The Triton kernels of logprob_increase and topk_compaction: interpreted on the CPU in a process of their own, since
Triton reads TRITON_INTERPRET when it is imported; and on the GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
HERE = Path(__file__).parent
CASES = ["cases_logprob", "cases_topk"]


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize(
    "place",
    ["interpreted", pytest.param("gpu", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))],
)
def test_cases(cases, place):
    # the cases ask torch for its deterministic mode, which cuBLAS has with this setting
    fixed = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TRITON_INTERPRET": "1" if place == "interpreted" else "0"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / "interpreted" / f"{cases}.py")]
    done = subprocess.run(command, env=os.environ | fixed, cwd=HERE, capture_output=True, text=True)
    report = done.stdout[-20000:] + done.stderr[-5000:]
    assert done.returncode == 0, report
    assert " passed" in report
    assert " skipped" not in report, report
