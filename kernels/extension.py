"""The compiled extension of the kernels."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType


@cache
def cpu_extension() -> tuple[ModuleType | None, str]:
    """Return the compiled module and "", or None and the reason why it is missing."""
    try:
        return importlib.import_module("._cpu", __package__), ""
    except ImportError as error:
        return None, f"the C++ extension is not built or does not load ({error})"
