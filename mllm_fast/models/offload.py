"""Weights that accelerate keeps on the disk or the CPU and reads in layer by layer (`device_map`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..core.split import local


def weight_of(module: Any) -> Tensor:
    """Return a module's weight, detached; an offloaded weight is read in, and a divided one is this process's part."""
    with read_in(module):
        return local(module.weight.detach())


@contextmanager
def read_in(module: Any) -> Iterator[None]:
    """Hold a module's offloaded weights in memory inside the block."""
    if all(tensor.device.type != "meta" for tensor in module.parameters(recurse=False)):
        yield
        return
    from accelerate.utils import align_module_device  # accelerate is installed, because it offloaded the weights

    with align_module_device(module):
        yield


def stored_tensor(model: Any, name: str) -> Tensor:
    """Return an offloaded parameter or buffer of a model, read in and detached."""
    from accelerate.utils import align_module_device

    prefix, _, own = name.rpartition(".")
    module = model.get_submodule(prefix)
    with align_module_device(module):
        return getattr(module, own).detach()


def home_of(model: Any) -> torch.device:
    """Return the device of what belongs to all layers of a model: the CPU if they compute on several devices."""
    given = {place for place in getattr(model, "hf_device_map", {}).values() if place != "disk"}
    places = {torch.device(f"cuda:{place}" if isinstance(place, int) else place) for place in given}
    several = len({place for place in places if place.type != "cpu"}) > 1
    return torch.device("cpu") if several else device_of(model)


def device_of_part(part: Any) -> torch.device:
    """Return the device on which a part of a model computes, such as the attention of a layer."""
    found = next((one for one in part.modules() if isinstance(getattr(one, "weight", None), Tensor)), None)
    return next(iter((*part.parameters(), *part.buffers()))).device if found is None else device_of(found)


def device_of(module: Any) -> torch.device:
    """Return the device on which a module computes.

    It is the device of the weights, or the one that offloaded weights are read to.
    """
    device = module.device if hasattr(module, "device") else module.weight.device
    return device if device.type != "meta" else torch.device(module._hf_hook.execution_device)
