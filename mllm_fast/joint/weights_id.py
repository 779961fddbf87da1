"""Fingerprints of models' weights, which tell the two models that W belongs to."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from ..models.offload import stored_tensor

_SAMPLES = 256  # about so many values of each tensor are hashed, evenly spaced


def weights_name(model: Any) -> str:
    """Return a fingerprint of a model's weights, a SHA-256 digest in hexadecimal.

    The digest covers the name, the shape and some values of each weight. The values are taken as bfloat16, so the
    fingerprint is the same for a model in float32 on a CPU and in half precision on a GPU.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        tensor = stored_tensor(model, name) if tensor.is_meta else tensor.detach()
        flat = tensor.reshape(-1)
        values = flat[:: max(1, flat.numel() // _SAMPLES)].to(torch.bfloat16).cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
