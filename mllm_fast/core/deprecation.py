"""Deprecated names of public attributes, which work for one release."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any


def renamed(**names: str) -> Callable[[Any, str], Any]:
    """Return a `__getattr__` that finds attributes by their old names, with a DeprecationWarning.

    Args:
        names: The new name of each attribute, as old=new.
    """

    def find(self: Any, name: str) -> Any:
        if name not in names:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        warnings.warn(f"{type(self).__name__}.{name} is called {names[name]} now", DeprecationWarning, stacklevel=2)
        return getattr(self, names[name])

    return find
