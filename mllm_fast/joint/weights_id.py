"""Which two models does W belong to?"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from ..models.offload import stored_tensor

_SAMPLES = 256  # values of a tensor that are looked at, evenly spaced


def weights_name(model: Any) -> str:
    """SHA-256, in hexadecimal, of each weight's name, shape and some of its values, as bfloat16: the same for a model
    loaded in float32 on a CPU and in half of that on a GPU."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        tensor = stored_tensor(model, name) if tensor.is_meta else tensor.detach()
        flat = tensor.reshape(-1)
        values = flat[:: max(1, flat.numel() // _SAMPLES)].to(torch.bfloat16).cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
