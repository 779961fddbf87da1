"""Choose the most attended positions of each layer, gather their keys and values.

Layer l keeps the `keep` candidates of largest mass (of equal ones the lower position), and every position that is
always kept; in order of position, so that what follows them still comes after them. A cache of N positions becomes
one of M; each kept row is read once, no other row at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import kernel_of

__all__ = ["Compaction", "topk_compaction"]


class Compaction(NamedTuple):
    """positions int64 [L, M], ascending; keys and values [L, Hkv, M, D]."""

    positions: Tensor
    keys: Tensor
    values: Tensor


@torch.no_grad()
def topk_compaction(
    mass: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    keep: int,
    candidates: Tensor,
    always: Tensor | None = None,
    backend: str = "auto",
) -> Compaction:
    """The kept positions of L layers, and their keys and values.

    Args:
        mass: float32 [L, N]; see `knockout_attention`. NaN counts as -inf.
        keys, values: L tensors each, [Hkv, N, D], all of one shape, type and device. Any strides but that of D,
            which is 1; they may differ between layers.
        keep: how many candidates each layer keeps, 0 to their number.
        candidates: which positions are chosen from, bool [N].
        always: which positions are kept in any case, bool [N]; none of them a candidate.
        backend: "triton", "torch" or "auto"; see `mllm_fast.kernels.dispatch`. There is no C++ kernel: this only
            moves memory.

    Returns:
        Compaction(positions, keys, values), M = keep + the number of positions that are always kept. Every backend
        gives the same, bit for bit.

    Raises:
        ValueError: names the argument, what it got and what it takes.
    """
    count = _check(mass, keys, values, keep, candidates, always)
    kernel = kernel_of("topk_compaction", mass.device, keys[0].dtype, backend)
    return Compaction(*kernel.compact(mass, keys, values, keep, candidates, always, count))


def _check(mass, keys, values, keep, candidates, always) -> int:
    """M, if all is well."""
    if mass.ndim != 2 or mass.shape[0] < 1 or mass.dtype != torch.float32:
        raise ValueError(f"mass is float32 [L, N] with L >= 1, got {mass.dtype} {_shape(mass)}")
    layers, positions = mass.shape
    for name, tensors in (("keys", keys), ("values", values)):
        if len(tensors) != layers:
            raise ValueError(f"{name} has one tensor a layer, {layers}, got {len(tensors)}")
        for layer, tensor in enumerate(tensors):
            if tensor.ndim != 3 or tensor.shape[1] != positions or 0 in tensor.shape[::2]:
                raise ValueError(f"{name}[{layer}] is [Hkv, {positions}, D], got {_shape(tensor)}")
            if tensor.shape != keys[0].shape:
                raise ValueError(f"{name}[{layer}] is {_shape(keys[0])} as keys[0] is, got {_shape(tensor)}")
            if not tensor.dtype.is_floating_point or tensor.dtype != keys[0].dtype:
                raise ValueError(f"{name}[{layer}] is floating and of keys[0]'s type, got {tensor.dtype}")
            if tensor.device != mass.device:
                raise ValueError(f"{name}[{layer}] is on {tensor.device}, mass on {mass.device}: move it there")
            if tensor.stride(2) != 1 and tensor.shape[2] > 1:
                raise ValueError(f"{name}[{layer}]'s last dimension has stride 1, got {tensor.stride(2)}: copy it")
    for name, tensor in (("candidates", candidates), ("always", always)):
        if tensor is None:
            continue
        if tensor.shape != (positions,) or tensor.dtype != torch.bool:
            raise ValueError(f"{name} is bool [{positions}], got {tensor.dtype} {_shape(tensor)}")
        if tensor.device != mass.device:
            raise ValueError(f"{name} is on {tensor.device}, mass on {mass.device}: move it there")
    either = torch.zeros_like(candidates) if always is None else always
    # one copy from the device for all three
    most, fixed, shared = torch.stack([candidates.sum(), either.sum(), (candidates & either).sum()]).tolist()
    if shared:
        raise ValueError(f"always has no position that is a candidate, got {shared}")
    if isinstance(keep, bool) or not isinstance(keep, int) or not 0 <= keep <= most:
        raise ValueError(f"keep is 0 to the number of candidates, {most}, got {keep!r}")
    return keep + fixed


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
