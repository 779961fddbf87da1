"""The exception for input that cannot be used."""

from __future__ import annotations

from collections.abc import Sequence


class InputError(ValueError):
    """Input that cannot be used. The message says what was got, what is accepted and what to do.

    The command line prints the message in one line and exits with code 2.
    """


class EndsRunError(InputError):
    """An error that no single image causes, so the next image would fail as well."""


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, preceded by the name of the error if the line is short."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return line if len(line) > 20 else f"{type(error).__name__} {line}".strip()


def check_choice(name: str, given: str, choices: Sequence[str]) -> None:
    """Raise InputError unless `given` is one of the choices."""
    if given not in choices:
        raise InputError(f"{name} is one of {', '.join(choices)}, got {given!r}")
