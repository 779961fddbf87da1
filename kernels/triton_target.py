"""What the Triton kernels are compiled by and for: tiles that spill no register differ with both."""

from __future__ import annotations

from functools import cache

import torch
import triton

RELEASE = tuple(int(part) for part in triton.__version__.split(".")[:2])  # of Triton


@cache
def chip(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and number of multiprocessors; a small A100 for Triton's interpreter."""
    if device.type != "cuda":
        return (8, 0), 4
    return torch.cuda.get_device_capability(device), torch.cuda.get_device_properties(device).multi_processor_count
