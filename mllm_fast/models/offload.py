"""Weights that accelerate keeps on the disk or the CPU and reads in layer by layer (`device_map`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
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


def one_gpu() -> dict[int | str, int] | None:
    """Return accelerate's `max_memory` for the first GPU, the CPU and the disk.

    Returns:
        The memory by device, or None, which leaves the choice to accelerate, if there is no GPU or no accelerate.
    """
    if not torch.cuda.is_available() or find_spec("accelerate") is None:
        return None
    from accelerate.utils import get_max_memory

    return {place: size for place, size in get_max_memory().items() if place in (0, "cpu")}


def check_one_device(model: Any) -> None:
    """Raise InputError for a model whose layers compute on several devices.

    Keys, masks and recordings lie on one device.
    """
    given = {place for place in getattr(model, "hf_device_map", {}).values() if place != "disk"}
    places = {torch.device(f"cuda:{place}" if isinstance(place, int) else place) for place in given}
    if len({place for place in places if place.type != "cpu"}) > 1:
        raise InputError(
            f"the model is spread over {', '.join(sorted(map(str, places)))}; one GPU, the CPU and the disk are"
            " supported: load it with device='auto', or a device_map of one GPU"
        )


def device_of(module: Any) -> torch.device:
    """Return the device on which a module computes.

    It is the device of the weights, or the one that offloaded weights are read to.
    """
    device = module.device if hasattr(module, "device") else module.weight.device
    return device if device.type != "meta" else torch.device(module._hf_hook.execution_device)
