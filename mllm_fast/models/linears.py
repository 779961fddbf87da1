"""Linear layers by what they compute: the weight of a layer that is plain, quantised or adapted."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import weight_state
from .offload import device_of, weight_of

_ROWS = 512  # rows of the identity that a layer is run on at a time


def is_plain(module: Any) -> bool:
    """Return whether a layer is torch's own linear layer with a weight of 16 bits or more."""
    weight = getattr(module, "weight", None)
    return (
        type(module) is nn.Linear
        and isinstance(weight, Tensor)
        and type(weight) is nn.Parameter
        and weight.is_floating_point()
        and weight.itemsize >= 2
    )


@torch.no_grad()
def effective_weight(module: Any) -> Tensor:
    """Return the weight W of a layer that computes W x + b, [out, in].

    A plain layer gives its own weight. Any other (quantised, or with an adapter that is not merged) is run on the rows
    of the identity, so that the result is what it computes, whatever it stores.
    """
    if is_plain(module):
        return weight_of(module)
    width, device, dtype = module.in_features, device_of_linear(module), compute_dtype(module)
    bias = module(torch.zeros(1, width, device=device, dtype=dtype))
    columns = []
    for start in range(0, width, _ROWS):
        some = torch.zeros(min(_ROWS, width - start), width, device=device, dtype=dtype)
        some[:, start : start + _ROWS].fill_diagonal_(1)
        columns.append((module(some) - bias).mT)
    return torch.cat(columns, 1)


def linear_state(module: Any) -> Hashable:
    """Return a value that changes whenever the tensors of a layer do."""
    if type(module) is nn.Linear:
        return weight_state(module.weight)
    return tuple(weight_state(tensor) for tensor in (*module.parameters(), *module.buffers()))


def device_of_linear(module: Any) -> torch.device:
    """Return the device on which a layer computes."""
    if isinstance(getattr(module, "weight", None), Tensor):
        return device_of(module)
    return next((*module.parameters(), *module.buffers())).device  # type: ignore[call-overload]


def compute_dtype(module: Any) -> torch.dtype:
    """Return the dtype of the rows that a layer takes: that of its floating-point tensors, or float32."""
    found = [tensor.dtype for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
    return next((dtype for dtype in found if dtype.itemsize >= 2), torch.float32)
