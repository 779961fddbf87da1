"""The defaults of options that a user's config file gives."""

from __future__ import annotations

import difflib
import logging
import os
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.errors import InputError, first_line

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_log = logging.getLogger(__name__)
VARIABLE, MODEL_VARIABLE = "MLLM_FAST_CONFIG", "MLLM_FAST_MODEL"
_SAID = {
    str: "a text in quotes",
    Path: "a text in quotes",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


def config_file() -> Path | None:
    """Return the path of the config file, or None if there is none.

    It is what the variable MLLM_FAST_CONFIG names, or else mllm-fast/config.toml in the folder XDG_CONFIG_HOME, which
    is ~/.config by default.
    """
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config")  # relative ones are ignored, as XDG says
    path = (folder if folder.is_absolute() else Path("~/.config")) / "mllm-fast" / "config.toml"
    try:
        path = path.expanduser()
    except RuntimeError:  # a user without a home
        return None
    return path if os.path.lexists(path) else None


def defaults(group: Any) -> dict[str, Any]:
    """Return what the config file gives the commands of a group, as click's `default_map`.

    Args:
        group: The main command of the command line.

    Returns:
        A dict from the name of a command to a dict from the name of a parameter to its default; that of a group of
        commands is a dict of such dicts. It is empty without a file.

    Raises:
        InputError: The file cannot be read, or it has a key or a value that no option takes.
    """
    path = config_file()
    if path is None:
        return {}
    try:
        with open(path, "rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise InputError(f"{path}: the config file cannot be read: {error.strerror}") from None
    except ValueError as error:  # no TOML, or no UTF-8
        raise InputError(f"{path}: the config file is not TOML: {first_line(error)}") from None
    _log.debug("defaults come from %s", path)
    found: dict[str, Any] = {}
    _read(path, group, content, (), found)
    return found


def _read(path: Path, group: Any, table: dict[str, Any], names: tuple[str, ...], found: dict[str, Any]) -> None:
    """Add a table of the file to what was found: first its keys, then the tables in it, which go before them."""
    tables = {name: value for name, value in table.items() if isinstance(value, dict)}
    for key, value in table.items():
        if key not in tables:
            _give(path, group, key, value, names, found)
    inside = getattr(group, "commands", {})
    for name, content in tables.items():
        place = ".".join((*names, name))
        if name not in inside:
            accepted = ", ".join(inside) or "none; its keys are its options"
            raise InputError(f"{path}: [{place}] is no command; the tables here are named by commands: {accepted}")
        _read(path, inside[name], content, (*names, name), found)


def _give(path: Path, group: Any, key: str, value: Any, names: tuple[str, ...], found: dict[str, Any]) -> None:
    """Make a value the default of an option, in each command of the group that has it."""
    known: dict[str, set[str]] = {}
    given = False
    for place, options in _options(group, names):
        for option, (parameter, kind) in options.items():
            known.setdefault(option, set()).add(_said(kind))
            if option == key.replace("_", "-") and _fits(value, kind):
                given = True
                target = found
                for name in place:
                    target = target.setdefault(name, {})
                target[parameter] = _expanded(value)
    if given:
        return
    where = f"{key} in [{'.'.join(names)}]" if names else key
    accepted = known.get(key.replace("_", "-"))
    if accepted is not None:
        raise InputError(f"{path}: {where} is {' or '.join(sorted(accepted))}, got {value!r}")
    if key in ("plugin", "verbose"):
        raise InputError(f"{path}: {where} is not read from a file; give it before the command: mllm-fast --{key} ...")
    if names:
        raise InputError(f"{path}: {where} is no option; accepted are {', '.join(known) or 'none'}")
    close = difflib.get_close_matches(key.replace("_", "-"), known, 3)
    hint = (
        f"is {' or '.join(close)} meant?" if close else "keys are options without their dashes, such as model, device"
    )
    raise InputError(f"{path}: {where} is an option of no command; {hint} (mllm-fast COMMAND --help lists them)")


def _options(group: Any, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, tuple[str, Any]]]]:
    """Yield the place of each command in a group, or of a command itself, and its options by their long names.

    Each option is the name of its parameter and its type. Of the options --model, only those that mean the model that
    answers are common to commands: not that of `info`, nor that of a released W.
    """
    if hasattr(group, "commands"):
        for name, command in group.commands.items():
            for place, options in _options(command, (*names, name)):
                own = () if _shared(command) else ("model",)
                yield place, {option: one for option, one in options.items() if option not in own}
        return
    hints = typing.get_type_hints(group.callback)
    found: dict[str, tuple[str, Any]] = {}
    for one in group.params:
        if one.param_type_name == "option" and one.name in hints:
            found |= {text[2:]: (one.name, hints[one.name]) for text in one.opts if text.startswith("--")}
    yield names, found


def _shared(command: Any) -> bool:
    """Return whether a command's --model is the one that the variable MLLM_FAST_MODEL sets, if it has one at all."""
    return all(one.envvar for one in getattr(command, "params", ()) if one.name == "model")


def _kind(hint: Any) -> tuple[Any, bool]:
    """Return the type of an option's value, and whether it takes several."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    (kind,) = (one for one in parts if one is not type(None))
    several = typing.get_origin(kind) is list
    return (typing.get_args(kind)[0] if several else kind), several


def _fits(value: Any, hint: Any) -> bool:
    kind, several = _kind(hint)
    if several:
        return isinstance(value, list) and all(_is(one, kind) for one in value)
    return _is(value, kind)


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or kind is bool:  # Python's bool is an int
        return isinstance(value, bool) and kind is bool
    return isinstance(value, str if kind is Path else (int, float) if kind is float else kind)


def _said(hint: Any) -> str:
    kind, several = _kind(hint)
    return f"an array, each {_SAID[kind]}" if several else _SAID[kind]


def _expanded(value: Any) -> Any:
    """Return the value with a home folder for "~/", which no shell has replaced in a file."""
    if isinstance(value, list):
        return [_expanded(one) for one in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value
