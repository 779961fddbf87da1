"""Import of the files and modules that a user names, which register what they add."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType

from .errors import InputError, first_line

_loaded: dict[str, ModuleType] = {}


def load_plugins(names: Iterable[str]) -> None:
    """Import Python files ("my_methods.py") or modules ("my_package.methods"); each is imported only once.

    Raises:
        InputError: A file or module does not exist or cannot be imported, or a file has the name of another module.
    """
    for name in names:
        name = str(Path(name).resolve()) if name.endswith(".py") else name
        if name not in _loaded:
            _loaded[name] = _import(name)


def loaded_plugins() -> dict[str, ModuleType]:
    """Return what `load_plugins` imported, as a dict from absolute path or module name to module."""
    return dict(_loaded)


def _import(name: str) -> ModuleType:
    path = Path(name)
    is_file = name.endswith(".py")
    if is_file and not path.is_file():
        raise InputError(f"the plugin {name} is not there; give a .py file, or the name of an installed module")
    module = path.stem if is_file else name
    if is_file:
        # imported under its own name, so that worker processes find the classes that it defines
        sys.path.insert(0, str(path.parent))
    try:
        found = import_module(module)
    except InputError:
        raise
    except Exception as error:  # a file can raise anything
        raise InputError(f"the plugin {name} cannot be imported: {first_line(error)}") from error
    finally:
        if is_file and _found_elsewhere(module, path):
            sys.path.remove(str(path.parent))
    if is_file and _found_elsewhere(module, path):
        raise InputError(f"the plugin {name} has the name of another module ({found.__name__}); rename the file")
    return found


def _found_elsewhere(module: str, path: Path) -> bool:
    """Return whether the module of this name is not the one in this file."""
    known = getattr(sys.modules.get(module), "__file__", None)
    return known is None or Path(known).resolve() != path
