"""mllm-fast: explains which image patches and attention heads made a vision-language model speak.

Importing this package loads neither torch nor a model and patches nothing; names are bound on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "VLM": ".vlm",
    "Answer": ".answers",
    "Context": ".context",
    "ContextStore": ".store",
    "Explanation": ".explain",
    "Knockout": ".knockout",
    "TokenLayout": ".layout",
    "InputError": ".errors",
}
__all__ = ["VLM", "Answer", "Context", "ContextStore", "Explanation", "InputError", "Knockout", "TokenLayout"]

if TYPE_CHECKING:
    from .answers import Answer
    from .context import Context
    from .errors import InputError
    from .explain import Explanation
    from .knockout import Knockout
    from .layout import TokenLayout
    from .store import ContextStore
    from .vlm import VLM


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    try:
        value = getattr(importlib.import_module(_HOME[name], __name__), name)
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.kernels":
            raise
        raise ImportError(
            "this mllm_fast is a checkout, whose kernels/ lies beside it: run Python from another folder, or install"
            " the checkout with `pip install -e .`"
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
