"""The value of each position, weighted by the attention of one row.

    out[g, n] = alpha_n v_n,    alpha = softmax over the seen n of scale q . k_n

The heads g belong to one row. The keys and values come from the cache, and query heads may share a key head. The sum
over the positions n is the output of head g. Each summand, projected, is the write of one position to the residual
stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..dispatch import kernel_of

__all__ = ["weighted_values"]


@torch.no_grad()
@without_autocast
def weighted_values(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    heads: Sequence[tuple[int, int]],
    *,
    count: int,
    scale: Sequence[float],
    seen: Sequence[Tensor | None] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute the weighted values alpha_n v_n of some heads of one row, for the first `count` positions.

    Args:
        query: Query of the row in each layer, [L, H, D].
        keys, values: L tensors each, [Hkv, N, D], in the dtype of `query`; H is a multiple of Hkv. The stride of D is
            1; the other strides are free and may differ between layers.
        heads: The (layer, head) pairs of the G heads.
        count: Number of positions, 1 to N; later positions are ignored.
        scale: Factor of the scores of each layer.
        seen: Mask of the positions that the row sees in each layer, bool [N], or None where it sees all. The row sees
            at least one position.
        backend: "triton", "cpu", "torch" or "auto"; see `mllm_fast.kernels.dispatch`.

    Returns:
        The weighted values [G, count, D] in float32 (float64 for float64), with zeros at positions that are not seen.

    Raises:
        ValueError: An argument is not valid. The message names the argument, what it got and what it takes.
    """
    _check(query, keys, values, heads, count, scale, seen)
    kernel = kernel_of("weighted_values", query.device, query.dtype, backend)
    return kernel.weighted_values(query, keys, values, heads, count, scale, seen or [None] * len(keys))


def _check(query, keys, values, heads, count, scale, seen) -> None:
    """Check the arguments with few and cheap tests, because a streamed explanation calls this once per token."""
    if query.ndim != 3 or not query.dtype.is_floating_point:
        raise ValueError(f"query is floating [L, H, D], got {query.dtype} {list(query.shape)}")
    layers, each, width = query.shape
    lists = {"keys": keys, "values": values, "scale": scale} | ({} if seen is None else {"seen": seen})
    for name, entries in lists.items():
        if len(entries) != layers:
            raise ValueError(f"{name} has one entry a layer, {layers}, got {len(entries)}")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"count is a number of positions, 1 or more, got {count!r}")
    for layer, head in heads:
        if not (0 <= layer < layers and 0 <= head < each):
            raise ValueError(f"heads lie in 0 .. {layers - 1}, 0 .. {each - 1}, got ({layer}, {head})")
    for layer in {layer for layer, _ in heads}:
        for name, tensor in (("keys", keys[layer]), ("values", values[layer])):
            if tensor.ndim != 3 or tensor.shape[1] < count or tensor.shape[2] != width or each % len(tensor):
                raise ValueError(
                    f"{name}[{layer}] is [Hkv, {count} or more, {width}], {each} a multiple of Hkv, got"
                    f" {list(tensor.shape)}"
                )
            if tensor.dtype != query.dtype or tensor.device != query.device:
                raise ValueError(
                    f"{name}[{layer}] is {query.dtype} on {query.device} as query is, got {tensor.dtype} on"
                    f" {tensor.device}"
                )
            if tensor.stride(2) != 1 and width > 1:
                raise ValueError(f"{name}[{layer}]'s last dimension has stride 1, got {tensor.stride(2)}: copy it")
        if keys[layer].shape != values[layer].shape:
            raise ValueError(f"values[{layer}] is {list(keys[layer].shape)}, got {list(values[layer].shape)}")
        mask = None if seen is None else seen[layer]
        if mask is not None and (mask.ndim != 1 or mask.dtype != torch.bool or len(mask) < count):
            raise ValueError(f"seen[{layer}] is bool [{count} or more], got {mask.dtype} {list(mask.shape)}")
