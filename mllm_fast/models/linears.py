"""Linear layers by what they compute: the weight of a layer that is plain, quantised or adapted.

A quantised layer that its library can dequantise gives that weight. Any other layer is run on the rows of the identity.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from ..core.split import is_sharded, local
from ..kernels import weight_state
from .norms import relative_error
from .offload import device_of, weight_of

_ROUNDED_INPUTS = 0.05  # by which the output of a layer that rounds its inputs to 8 bits may differ from W x
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
    """Return the weight W of a layer that computes W x + b, [out, in]; of a divided one, this process's part.

    A plain layer gives its own weight, a quantised one the weight that its library dequantises. Any other (with an
    adapter that is not merged, of an unknown library) is run on the rows of the identity, so that the result is what it
    computes, whatever it stores.
    """
    if is_plain(module) or is_sharded(getattr(module, "weight", None)):
        return weight_of(module)
    stored = dequantised(module)
    if stored is not None:
        return stored
    width, device, dtype = module.in_features, device_of_linear(module), compute_dtype(module)
    bias = module(torch.zeros(1, width, device=device, dtype=dtype))
    columns = []
    for start in range(0, width, _ROWS):
        some = torch.zeros(min(_ROWS, width - start), width, device=device, dtype=dtype)
        some[:, start : start + _ROWS].fill_diagonal_(1)
        columns.append((module(some) - bias).mT)
    return torch.cat(columns, 1)


def dequantised(module: Any) -> Tensor | None:
    """Return the weight of a quantised layer as its library dequantises it, [out, in], or None if there is no such way.

    The libraries are torchao, quanto, bitsandbytes and HQQ, and any other with the same interface. None is returned,
    too, if the layer computes something else: some libraries pack the weights anew before the first call.
    """
    # an adapter's attribute of this name is the weight of what it adapts
    weight: Any = dict(module.named_parameters(recurse=False)).get("weight")
    if type(weight).__name__ in ("Int8Params", "Params4bit"):
        found = dequantize_bnb_weight(weight, module.state if hasattr(module, "state") else None)
    elif isinstance(weight, Tensor) and type(weight) is not nn.Parameter and hasattr(weight, "dequantize"):
        found = weight.dequantize()
    elif callable(getattr(module, "dequantize", None)):
        found = module.dequantize()
    else:
        return None
    if found.shape != (module.out_features, module.in_features):
        return None
    return found if weight_error(module, found) <= _ROUNDED_INPUTS else None


def weight_error(module: Any, weight: Tensor) -> float:
    """Return by how much of its output a layer differs from a weight [out, in], on a random row."""
    row = torch.randn(1, module.in_features, generator=torch.Generator().manual_seed(0))
    row = row.to(device_of_linear(module), compute_dtype(module))
    got = module(row) - module(torch.zeros_like(row))
    return relative_error(got, row.double() @ weight.double().mT)


def linear_state(module: Any) -> Hashable:
    """Return a value that changes whenever the tensors of a layer do."""
    if type(module) is nn.Linear:
        return weight_state(local(module.weight))
    return tuple(weight_state(local(tensor)) for tensor in (*module.parameters(), *module.buffers()))


def device_of_linear(module: Any) -> torch.device:
    """Return the device on which a layer computes."""
    if isinstance(getattr(module, "weight", None), Tensor):
        return device_of(module)
    return next(iter((*module.parameters(), *module.buffers()))).device


def compute_dtype(module: Any) -> torch.dtype:
    """Return the dtype of the rows that a layer takes: that of its floating-point tensors, or float32."""
    found = [tensor.dtype for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
    return next((dtype for dtype in found if dtype.itemsize >= 2), torch.float32)
