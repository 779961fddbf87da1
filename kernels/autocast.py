"""torch.autocast at the seam: attention casts its operands as torch's own does, and scores are computed as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
_DEVICES = ("cpu", "cuda")


def cast_operands(*operands: Tensor) -> tuple[Tensor, ...]:
    """Return the operands of an attention in the type that `scaled_dot_product_attention` computes it in.

    Under `torch.autocast` that is the type of autocast, for all but float64. Elsewhere they are returned as they are.
    """
    kind = operands[0].device.type
    if not torch.is_autocast_enabled(kind):
        return operands
    lower = torch.get_autocast_dtype(kind)
    return tuple(one if one.dtype == torch.float64 else one.to(lower) for one in operands)


def without_autocast(call: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that `torch.autocast` changes no type in it."""

    @functools.wraps(call)
    def plain(*args: P.args, **kwargs: P.kwargs) -> R:
        enabled = [kind for kind in _DEVICES if torch.is_autocast_enabled(kind)]
        if not enabled:
            return call(*args, **kwargs)
        with torch.autocast(enabled[0], enabled=False), torch.autocast(enabled[-1], enabled=False):
            return call(*args, **kwargs)

    return plain
