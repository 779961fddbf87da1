"""Cases that repeat others with more types, sizes and models: `MLLM_FAST_SWEEP=1 pytest` runs them as well."""

from __future__ import annotations

import os
from typing import TypeVar

ASKED = bool(os.environ.get("MLLM_FAST_SWEEP"))
Case = TypeVar("Case")


def also(*cases: Case) -> tuple[Case, ...]:
    """The cases if the sweep is asked for, else none."""
    return cases if ASKED else ()
