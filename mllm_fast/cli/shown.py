"""How commands are shown by --help."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup


def _untyped(parameters: list[Any]) -> list[Any]:
    """Return the parameters, with no type beside the flags: some releases of Typer show <bool>, as if they took one."""
    for one in parameters:
        if getattr(one, "is_flag", False) or getattr(one, "count", False):
            one.metavar = ""
    return parameters


class Command(TyperCommand):
    """A command whose flags have no type."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _untyped(super().get_params(ctx))


class Group(TyperGroup):
    """A group of commands whose flags have no type, in the order in which `order` names them, if it is given."""

    order: tuple[str, ...] = ()

    def get_params(self, ctx: Any) -> list[Any]:
        return _untyped(super().get_params(ctx))

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=self.order.index) if self.order else list(self.commands)
