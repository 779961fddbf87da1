"""Extension points: a registry finds things by name, in the package, in a user's file or in an installed plugin."""

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
    """A registry of named things of one kind.

    Listing the names imports nothing. The module of a thing is imported when the thing is first asked for, and
    registers it.

    Args:
        what: What the things are, for messages, as in "heatmap method".
        group: The group of entry points by which an installed package adds things. The name of the entry point is the
            name of the thing, and loading it registers the thing.
        modules: The module that registers each of the package's own things, by name.
    """

    def __init__(self, what: str, group: str, modules: Mapping[str, str]):
        self.what, self.group = what, group
        self._a_thing = f"{'an' if what[0] in 'aeiou' else 'a'} {what}"
        self._own = frozenset(modules)
        self._modules = dict(modules)
        self._found: dict[str, T] = {}

    def register(self, name: str, thing: T, module: str) -> None:
        """Add a thing.

        Args:
            name: The name of the thing.
            thing: The thing.
            module: The name of the module that registers it.

        Raises:
            InputError: The name is taken, or is not lower-case letters, digits, "-" and "_".
        """
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
            raise InputError(f"the name of {self._a_thing} is lower-case letters, digits, '-' and '_', got {name!r}")
        # a module that is run again (a notebook's cell, a worker's import) registers its things again
        if self._modules.get(name, module) != module:
            raise InputError(f"there is {self._a_thing} {name!r} already; choose another name")
        self._modules[name] = module
        self._found[name] = thing

    def names(self) -> tuple[str, ...]:
        """Return all names: those of the package first, then registered ones, then those of installed plugins."""
        return tuple(dict.fromkeys([*self._modules, *(one.name for one in _offered(self.group))]))

    def added(self) -> tuple[str, ...]:
        """Return the names that do not come with the package."""
        return tuple(name for name in self.names() if name not in self._own)

    def get(self, name: str) -> T:
        """Return the thing with this name.

        Raises:
            InputError: There is no such thing. The message lists the names that exist.
        """
        if name not in self._found:
            self._load(name)
        if name not in self._found:
            raise InputError(f"{self._a_thing} is one of {', '.join(self.names())}, got {name!r}")
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
