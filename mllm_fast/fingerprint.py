"""Which model is it? A short name for a model's configuration and weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .kernels import weight_state

_SAMPLES = 4096  # values of a large tensor that are looked at, evenly spaced
_VOLATILE = ("_name_or_path", "transformers_version", "_commit_hash", "_attn_implementation", "attn_implementation")
_known: WeakKeyDictionary[nn.Module, tuple[Hashable, str]] = WeakKeyDictionary()


def fingerprint(model: Any) -> str:
    """SHA-256, in hexadecimal, of the configuration, and of each weight's name, shape, type and values; of a tensor of
    more than 4,096 values as many of them, evenly spaced. A training step, merged adapters and quantisation show
    there; a few edited rows of a large matrix may not.

    Kept until the configuration, a weight, or one of a few values of each weight is another one.
    """
    tensors = dict(sorted(model.state_dict(keep_vars=True).items()))
    config = json.dumps(_without(model.config.to_dict()), sort_keys=True, default=str)
    # what is written by way of .data leaves no other trace than the values
    state = config, tuple(weight_state(tensor) for tensor in tensors.values()), _few_values(list(tensors.values()))
    if model in _known and _known[model][0] == state:
        return _known[model][1]
    digest = hashlib.sha256(config.encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLES)
        digest.update(flat[::step].contiguous().cpu().view(torch.uint8).numpy().tobytes())
    _known[model] = state, digest.hexdigest()
    return digest.hexdigest()


def _few_values(tensors: list[torch.Tensor]) -> bytes:
    """The middle value of each tensor, with one copy from each device."""
    middle: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        flat = tensor.detach().view(-1) if tensor.is_contiguous() else tensor.detach().flatten()
        if flat.numel():
            middle.setdefault(flat.device, []).append(flat[flat.numel() // 2].double())
    return b"".join(torch.stack(values).cpu().numpy().tobytes() for values in middle.values())


def _without(config: Any) -> Any:
    """The configuration without what does not tell one model from another."""
    if isinstance(config, dict):
        return {name: _without(value) for name, value in config.items() if name not in _VOLATILE}
    return [_without(value) for value in config] if isinstance(config, (list, tuple)) else config
