"""Selection of the most attended positions of each layer, with their keys and values.

Each layer keeps the `keep` candidates with the largest attention mass, and every position that is always kept. Among
candidates of equal mass the lower position wins. The kept positions stay in ascending order, so that causality holds
for the tokens that follow. A cache of N positions becomes a cache of M positions. Each kept row is read once, and no
other row is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..dispatch import kernel_of

__all__ = ["Compaction", "topk_compaction"]


class Compaction(NamedTuple):
    """The result of `topk_compaction`.

    Attributes:
        positions: The kept positions of each layer in ascending order, int64 [L, M].
        keys: The keys at these positions, [L, Hkv, M, D].
        values: The values at these positions, [L, Hkv, M, D].
    """

    positions: Tensor
    keys: Tensor
    values: Tensor


@torch.no_grad()
@without_autocast
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
    """Select the most attended positions of L layers and gather their keys and values.

    Args:
        mass: Attention mass of each position, float32 [L, N]; see `knockout_attention`. NaN counts as -inf.
        keys, values: L tensors each, [Hkv, N, D], all of one shape, dtype and device. The stride of D is 1; the other
            strides are free and may differ between layers.
        keep: Number of candidates that each layer keeps, from 0 to the number of candidates.
        candidates: Mask of the positions to choose from, bool [N].
        always: Mask of the positions that are kept in any case, bool [N]. None of them is a candidate.
        backend: "triton", "torch" or "auto"; see `mllm_fast.kernels.dispatch`. There is no C++ kernel, because the op
            only moves memory.

    Returns:
        Compaction(positions, keys, values), where M is `keep` plus the number of positions that are always kept.
        Every backend gives the same result, bit for bit.

    Raises:
        ValueError: An argument is not valid. The message names the argument, what it got and what it takes.
    """
    count = _check(mass, keys, values, keep, candidates, always)
    kernel = kernel_of("topk_compaction", mass.device, keys[0].dtype, backend)
    return Compaction(*kernel.compact(mass, keys, values, keep, candidates, always, count))


def _check(mass, keys, values, keep, candidates, always) -> int:
    """Check the arguments and return M, the number of kept positions."""
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
    # all three counts in one copy from the device
    most, fixed, shared = torch.stack([candidates.sum(), either.sum(), (candidates & either).sum()]).tolist()
    if shared:
        raise ValueError(f"always has no position that is a candidate, got {shared}")
    if isinstance(keep, bool) or not isinstance(keep, int) or not 0 <= keep <= most:
        raise ValueError(f"keep is 0 to the number of candidates, {most}, got {keep!r}")
    return keep + fixed


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
