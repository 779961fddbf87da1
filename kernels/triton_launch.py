"""A Triton kernel launched again and again with the same sizes.

Triton looks at every argument of every launch to find the compiled kernel that fits: about 40 us of Python for a kernel
of thirty arguments, once a layer and token. What it looks at are types, which integers are 1 or multiples of 16, and
which addresses are multiples of 16. A caller whose key holds all of these keeps a `Launch` and skips the look.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Plan = TypeVar("Plan")
_MOST = 4096  # plans held; decoding makes a new one every token


class Launch:
    """`fn` with its grid, constants (its last parameters, in order) and compiler options."""

    def __init__(self, fn: Any, grid: tuple[int, int, int], constants: dict[str, Any], options: dict[str, Any]):
        self.fn, self.grid, self.constants, self.options = fn, grid, constants, options
        self._again: Callable[..., None] | None = None
        self._values = tuple(constants.values())

    def __call__(self, *arguments: Any) -> None:
        if self._again is not None:
            self._again(*arguments, *self._values)
            return
        compiled = self.fn[self.grid](*arguments, **self.constants, **self.options)
        if compiled is not None:  # the interpreter compiles nothing
            self._again = compiled[self.grid]


def remembered(plans: dict[Any, Plan], key: Any, make: Callable[[], Plan]) -> Plan:
    """The plan of a key, made now if it is new; all are forgotten when they become many."""
    plan = plans.get(key)
    if plan is None:
        if len(plans) >= _MOST:
            plans.clear()
        plan = plans[key] = make()
    return plan
