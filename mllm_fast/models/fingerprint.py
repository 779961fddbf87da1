"""A fingerprint of a model: a short name for its configuration and weights."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedConfig

from ..core.split import Placed, is_sharded, local, place_of
from ..kernels import weight_state
from .offload import stored_tensor

_SAMPLES = 4096  # how many values of a large tensor are hashed, evenly spaced
_VOLATILE = (
    "distributed_config",
    "_name_or_path",
    "transformers_version",
    "_commit_hash",
    "_attn_implementation",
    "attn_implementation",
)


class _Seen(NamedTuple):
    """What a fingerprint was computed from.

    Attributes:
        config: The configuration at that time.
        modules: The modules and their tensors at that time.
        values: One value of each tensor, as a view that shows its present value.
        before: These values at that time, as bytes.
        digest: The fingerprint.
    """

    config: Any
    modules: _Modules
    values: list[torch.Tensor]
    before: bytes
    digest: str


class _Modules:
    """A snapshot of a tree of modules: which module holds what under which name, and the state of each tensor.

    It holds no reference to the root module, which would then never be freed.
    """

    def __init__(self, model: nn.Module):
        self._owners: list[tuple[ReferenceType[nn.Module], str, dict[str, Any]]] = []
        self._held: list[tuple[dict[str, Any], str, Any]] = []
        self._sizes: list[tuple[dict[str, Any], int]] = []
        self._tensors: list[torch.Tensor] = []
        seen, todo = {id(model)}, [model]
        while todo:
            module = todo.pop()
            for name in ("_parameters", "_buffers", "_modules"):
                inside = module.__dict__[name]
                self._owners.append((ref(module), name, inside))
                self._held += [(inside, key, value) for key, value in inside.items()]
                self._sizes.append((inside, len(inside)))
                if name == "_modules":
                    new = [child for child in inside.values() if child is not None and id(child) not in seen]
                    seen.update(map(id, new))
                    todo += new
                else:
                    self._tensors += [tensor for tensor in inside.values() if tensor is not None]
        self._states = [weight_state(local(tensor)) for tensor in self._tensors]

    def unchanged(self) -> bool:
        return (
            all(getattr(owner(), name, None) is inside for owner, name, inside in self._owners)
            and all(len(inside) == size for inside, size in self._sizes)
            and all(inside.get(name) is value for inside, name, value in self._held)
            and all(
                weight_state(local(tensor)) == state for tensor, state in zip(self._tensors, self._states, strict=True)
            )
        )


_known: WeakKeyDictionary[nn.Module, _Seen] = WeakKeyDictionary()


def fingerprint(model: Any) -> str:
    """Return a fingerprint of a model: the SHA-256, in hexadecimal, of its configuration and weights.

    The hash covers the name, shape, type and values of each weight. Of a tensor with more than 4,096 values it covers
    at least that many, evenly spaced. It does not depend on how the model is divided between processes, all of which
    make this call. A training step, merged adapters and quantisation change the fingerprint. An edit
    of a few rows of a large matrix may not.

    The result is cached until the configuration, a weight, or the middle value of a weight changes.
    """
    settings = _settings(model.config)
    seen = _known.get(model)
    # a write through .data changes nothing but the values
    if seen and seen.config == settings and seen.modules.unchanged() and _bytes(seen.values) == seen.before:
        return seen.digest
    config = json.dumps(_without(model.config.to_dict()), sort_keys=True, default=str)
    digest = hashlib.sha256(config.encode())
    middle = []
    weights = sorted(model.state_dict(keep_vars=True).items())
    divided = _of_divided(weights)
    for name, tensor in weights:
        if name in divided:
            shape, sampled = divided[name]
            digest.update(f"{name} {shape} {tensor.dtype}".encode())
            digest.update(sampled)
            middle += _middle(local(tensor.detach()))
            continue
        tensor = local(tensor)
        offloaded = tensor.is_meta
        if offloaded:
            tensor = stored_tensor(model, name)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        digest.update(flat[:: _step(flat.numel())].contiguous().cpu().view(torch.uint8).numpy().tobytes())
        if not offloaded:
            middle += _middle(tensor.detach())
    _known[model] = _Seen(settings, _Modules(model), middle, _bytes(middle), digest.hexdigest())
    return digest.hexdigest()


def _step(count: int) -> int:
    """Return how far apart the hashed values of a tensor lie."""
    return max(1, count // _SAMPLES)


def _middle(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the middle value of a tensor in a list, as a view; an empty list for an empty tensor."""
    return [tensor[tuple(size // 2 for size in tensor.shape)].reshape(1)] if tensor.numel() else []


def _of_divided(weights: Sequence[tuple[str, torch.Tensor]]) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """Return the whole shape and the hashed values of each weight that is divided between processes, by its name.

    Each process puts what it has of them into one buffer of bytes, which is joined once.
    """
    places = {name: place for name, tensor in weights if (place := place_of(tensor)) is not None}
    if not places:
        return {}
    parts, tensors = [], dict(weights)
    for name, place in places.items():
        parts.append(_held_samples(local(tensors[name].detach()), place).view(torch.uint8))
    whole = torch.cat(parts)
    group = next(one.device_mesh.get_group() for _, one in weights if is_sharded(one))  # type: ignore[attr-defined]
    dist.all_reduce(whole, dist.ReduceOp.MAX, group)  # bytes that others hold are 0 here
    every = whole.cpu().split([len(part) for part in parts])
    return {
        name: (place.shape, part.numpy().tobytes()) for (name, place), part in zip(places.items(), every, strict=True)
    }


def _held_samples(held: torch.Tensor, place: Placed) -> torch.Tensor:
    """Return the hashed values of a divided weight, 0 where another process has them."""
    dim, start, shape, blocks = place
    behind, count = math.prod(shape[dim + 1 :]), math.prod(shape)
    index = torch.arange(0, count, _step(count), device=held.device)
    block, mine_of_block = shape[dim] // blocks, held.shape[dim] // blocks
    row = index // behind % shape[dim]
    within = row % block - start
    mine = (within >= 0) & (within < mine_of_block)
    row = row // block * mine_of_block + within
    at = (index // (behind * shape[dim]) * held.shape[dim] + row) * behind + index % behind
    found = held.new_zeros(len(index))
    found[mine] = held.reshape(-1)[at[mine]]
    return found


def _settings(value: Any) -> Any:
    """Return a copy of a configuration's entries, to be compared later; `to_dict` takes four times as long."""
    if isinstance(value, PreTrainedConfig):
        value = vars(value)
    if isinstance(value, dict):
        return {name: _settings(entry) for name, entry in value.items() if not str(name).startswith("_")}
    return [_settings(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _bytes(values: list[torch.Tensor]) -> bytes:
    """Return the values as bytes, with one copy from each device."""
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for value in values:
        groups.setdefault((value.device, value.dtype), []).append(value)
    return b"".join(torch.cat(group).cpu().view(torch.uint8).numpy().tobytes() for group in groups.values())


def _without(config: Any) -> Any:
    """Return a configuration without the entries that do not tell one model from another."""
    if isinstance(config, dict):
        return {name: _without(value) for name, value in config.items() if name not in _VOLATILE}
    return [_without(value) for value in config] if isinstance(config, (list, tuple)) else config
