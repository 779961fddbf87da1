"""Under `.ci/sanitize`: the extension that the other tests use is the one built for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from mllm_fast.kernels.extension import cpu_extension

FOLDER = os.environ.get("MLLM_FAST_SANITIZED")


@pytest.mark.skipif(FOLDER is None, reason="run by .ci/sanitize")
def test_the_sanitized_extension_is_used():
    extension, reason = cpu_extension()
    assert extension is not None, reason
    assert Path(extension.__file__).is_relative_to(FOLDER)
