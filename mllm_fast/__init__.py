"""mllm-fast: explains which image patches and attention heads made a vision-language model speak.

Importing this package loads neither torch nor a model and patches nothing; names are bound on first use.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from typing import TYPE_CHECKING

__version__ = "0.1.0"
logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent until the caller sets up logging


def _use_installed() -> None:
    """In a checkout, whose kernels/ lies beside the package: what is installed is what runs, from any folder.

    Started from a checkout's root, Python finds the package there first. An editable install finds the kernels beside
    it; of any other install its own modules are used, compiled ones included.
    """
    if importlib.util.find_spec(f"{__name__}.kernels") is not None:
        return
    for entry in sys.path:
        folder = os.path.join(os.path.abspath(entry), __name__)
        if os.path.isfile(os.path.join(folder, "kernels", "__init__.py")):
            __path__[:] = [folder]
            return
    raise ImportError(
        f"this mllm_fast is a checkout ({__path__[0]}) and is not installed: its kernels are found once it is. Run"
        " `pip install .` in its root, or `pip install -e .` to work on it"
    )


if not os.path.isdir(os.path.join(__path__[0], "kernels")):
    _use_installed()

_HOME = {
    "VLM": ".vlm",
    "Answer": ".runtime.answer",
    "Context": ".context.context",
    "ContextStore": ".context.store",
    "Explanation": ".explain.explanation",
    "Knockout": ".knockout.rule",
    "Video": ".core.video",
    "TokenLayout": ".core.layout",
    "InputError": ".core.errors",
}
# the names that most users need; `Video` is beside them
__all__ = ["VLM", "Answer", "Context", "ContextStore", "Explanation", "InputError", "Knockout", "TokenLayout"]

if TYPE_CHECKING:
    from .context.context import Context
    from .context.store import ContextStore
    from .core.errors import InputError
    from .core.layout import TokenLayout
    from .core.video import Video as Video
    from .explain.explanation import Explanation
    from .knockout.rule import Knockout
    from .runtime.answer import Answer
    from .vlm import VLM


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
