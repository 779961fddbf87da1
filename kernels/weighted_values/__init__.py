"""What each position hands to a head: its value, weighed by the attention that a row pays to it.

    out[g, n] = alpha_n v_n,    alpha = softmax over the seen n of scale q . k_n

for heads g of one row, by their keys and values in the cache, those of query heads that share a key head too. Summed
over positions it is the head's output; each summand, projected, is a position's write to the residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import kernel_of

__all__ = ["weighted_values"]


@torch.no_grad()
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
    """alpha_n v_n of some heads of one row, for its first `count` positions.

    Args:
        query: of the row, [L, H, D].
        keys, values: L tensors each, [Hkv, N, D], H a multiple of Hkv; of query's type. Any strides but that of D,
            which is 1; they may differ between layers.
        heads: (layer, head) of each of G heads.
        count: positions, 1 to N; what comes after them does not count.
        scale: of the scores, a layer.
        seen: which positions the row sees, a layer: bool [N] or None for all of them. At least one is seen.
        backend: "triton", "cpu", "torch" or "auto"; see `mllm_fast.kernels.dispatch`.

    Returns:
        [G, count, D] in float32 (float64 for float64), zeros where a position is not seen.

    Raises:
        ValueError: names the argument, what it got and what it takes.
    """
    _check(query, keys, values, heads, count, scale, seen)
    kernel = kernel_of("weighted_values", query.device, query.dtype, backend)
    return kernel.weighted_values(query, keys, values, heads, count, scale, seen or [None] * len(keys))


def _check(query, keys, values, heads, count, scale, seen) -> None:
    """Few and cheap tests: a streamed explanation calls this once a token."""
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
