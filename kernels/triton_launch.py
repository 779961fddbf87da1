"""Fast repeated launches of a Triton kernel with the same sizes.

At every launch Triton inspects every argument to find the compiled kernel that fits. This takes about 40 us of Python
for a kernel of thirty arguments, once per layer and token. Triton inspects the types, which integers are 1 or multiples
of 16, and which addresses are multiples of 16. A caller that stores a `Launch` under a key with all of these skips the
inspection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Plan = TypeVar("Plan")
_MOST = 4096  # plans to remember; decoding makes a new one for every token


class Launch:
    """A kernel `fn` with its grid, its constants and its compiler options.

    The first call compiles the kernel, later calls launch the compiled kernel directly. The constants are the last
    parameters of `fn`, in order.
    """

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
    """Return the plan of a key, and make it first if the key is new; at 4096 plans all of them are dropped."""
    plan = plans.get(key)
    if plan is None:
        if len(plans) >= _MOST:
            plans.clear()
        plan = plans[key] = make()
    return plan
