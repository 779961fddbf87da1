"""Deprecated names of public attributes, which work for one release."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


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


def renamed_parameters(**names: str) -> Callable[[F], F]:
    """Accept parameters of a function by their old names, old=new, with a DeprecationWarning; a decorator."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old, new in names.items():
                if old in kwargs:
                    message = f"{old}= of {function.__qualname__} is called {new}= now"
                    warnings.warn(message, DeprecationWarning, stacklevel=2)
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate
