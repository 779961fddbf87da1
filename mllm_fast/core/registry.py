"""Extension points: things found by name, the package's own, a user's file's or an installed plugin's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from .errors import InputError

T = TypeVar("T")


class Registry(Generic[T]):
    """Named things of one kind.

    Listing the names imports nothing. A thing's module is imported when the thing is first asked for, and registers it.

    Args:
        what: what they are, for messages, as in "heatmap method".
        group: of the entry points by which an installed package offers more. The entry point's name is the thing's
            name, and loading it registers the thing.
        modules: the package's own, name -> the module that registers it.
    """

    def __init__(self, what: str, group: str, modules: Mapping[str, str]):
        self.what, self.group = what, group
        self._own = frozenset(modules)
        self._modules = dict(modules)
        self._found: dict[str, T] = {}

    def register(self, name: str, thing: T, module: str) -> None:
        """Add a thing; `module` is the name of the one that registers it.

        Raises:
            InputError: the name is taken, or is not lower-case letters, digits, "-" and "_".
        """
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
            raise InputError(f"the name of a {self.what} is lower-case letters, digits, '-' and '_', got {name!r}")
        # a module that is run again (a notebook's cell, a worker's import) registers its things again
        if self._modules.get(name, module) != module:
            raise InputError(f"there is a {self.what} {name!r} already; choose another name")
        self._modules[name] = module
        self._found[name] = thing

    def names(self) -> tuple[str, ...]:
        """All names: the package's own first, then those that were registered, then those of installed plugins."""
        return tuple(dict.fromkeys([*self._modules, *(one.name for one in _offered(self.group))]))

    def added(self) -> tuple[str, ...]:
        """The names that do not come with the package."""
        return tuple(name for name in self.names() if name not in self._own)

    def get(self, name: str) -> T:
        """The thing of this name.

        Raises:
            InputError: there is none; the message lists what there is.
        """
        if name not in self._found:
            self._load(name)
        if name not in self._found:
            raise InputError(f"a {self.what} is one of {', '.join(self.names())}, got {name!r}")
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def _load(self, name: str) -> None:
        if name in self._modules:
            import_module(self._modules[name])
            return
        for one in _offered(self.group):
            if one.name != name:
                continue
            one.load()
            if name not in self._found:
                raise InputError(f"the plugin {one.value} offers the {self.what} {name!r} but registers none so named")


@cache
def _offered(group: str) -> tuple[EntryPoint, ...]:
    return tuple(sorted(entry_points(group=group), key=lambda one: one.name))
