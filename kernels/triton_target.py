"""The Triton release and the chip, which both decide which tile sizes spill no register."""

from __future__ import annotations

from functools import cache

import torch
import triton

RELEASE = tuple(int(part) for part in triton.__version__.split(".")[:2])  # major and minor version of Triton


@cache
def chip(device: torch.device) -> tuple[tuple[int, int], int]:
    """Return the compute capability and the number of multiprocessors; Triton's interpreter counts as a small A100."""
    if device.type != "cuda":
        return (8, 0), 4
    return torch.cuda.get_device_capability(device), torch.cuda.get_device_properties(device).multi_processor_count
