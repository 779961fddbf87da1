"""Weights that accelerate keeps on disk, or beside a GPU, and reads in layer by layer (`device_map`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def weight_of(module: Any) -> Tensor:
    """A module's weight, read in if it is elsewhere; detached."""
    if module.weight.device.type != "meta":
        return module.weight.detach()
    from accelerate.utils import align_module_device  # whoever put it elsewhere has it

    with align_module_device(module):
        return module.weight.detach()


def stored_tensor(model: Any, name: str) -> Tensor:
    """A parameter or buffer of a model that is elsewhere, read in."""
    from accelerate.utils import align_module_device

    prefix, _, own = name.rpartition(".")
    module = model.get_submodule(prefix)
    with align_module_device(module):
        return getattr(module, own).detach()


def device_of(module: Any) -> torch.device:
    """Where a module computes: its weights' device, or the one they are read to."""
    device = module.device if hasattr(module, "device") else module.weight.device
    return device if device.type != "meta" else torch.device(module._hf_hook.execution_device)
