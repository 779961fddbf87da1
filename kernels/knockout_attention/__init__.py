"""Causal attention under a segment mask (arXiv 2411.17491, equation 3), with its by-products.

    O_r = sum_k alpha_rk v_k,    alpha_r = softmax over the keys k that row r sees of scale q_r . k_k

Row r sees key k if k is not after it, not left padding, and bit s_k of table[s_r] is 0, s the segment ids. A row
that sees no key gives zeros. Blocks of keys that no row of a block sees are never read: the cost follows the
work that is left, and no array of rows x keys is stored.

By-products of the same call: the log-sum-exp of each row's scores, and the attention mass of each key, the mean of
alpha over chosen rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import kernel_of

__all__ = ["SEGMENTS", "Attention", "join", "knockout_attention", "segment_table"]

SEGMENTS = 32
HEAD_SIZES = (16, 256)


class Attention(NamedTuple):
    """output [B, H, R, D], a view of [B, R, H, D]; lse [B, H, R] or None; mass [B, H, N] or None."""

    output: Tensor
    lse: Tensor | None
    mass: Tensor | None


def segment_table(rules: Iterable[tuple[int, int]], device: torch.device | str = "cpu") -> Tensor:
    """The table of rules (source, target): rows of segment `target` may not see keys of segment `source`.

    Returns int32 [32]; bit s of entry t is set for the rule (s, t).
    """
    words = [0] * SEGMENTS
    for source, target in rules:
        if not (0 <= source < SEGMENTS and 0 <= target < SEGMENTS):
            raise ValueError(f"segment ids are 0 .. {SEGMENTS - 1}, got the rule ({source}, {target})")
        words[target] |= 1 << source
    return torch.tensor([w - (w >> 31 << 32) for w in words], dtype=torch.int32, device=device)


def knockout_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    segments: Tensor | None = None,
    table: Tensor | None = None,
    start: Tensor | None = None,
    scale: float | None = None,
    lse: bool = False,
    mass: bool | Tensor = False,
    causal: bool = True,
    backend: str = "auto",
) -> Attention:
    """Attention of the last R of N positions, R <= N. Inference only.

    Args:
        query: [B, H, R, D], D from 16 to 256; float16, bfloat16 or float32 (plain torch: float64 too).
        key, value: [B, Hkv, N, D], H a multiple of Hkv. Any strides but that of D, which is 1.
        segments: id of each position, uint8 [B, N] (or [1, N] for all of the batch), 0 to 31; on a GPU they are
            not checked. With `table`.
        table: int32 [32]; see `segment_table`.
        start: first position of each sequence that is not left padding, int32 [B].
        scale: of the scores, D ** -0.5 by default.
        lse: return the log-sum-exp of each row's scaled scores, natural; -inf for a row that sees no key.
        mass: True, or the rows to count as bool [B, R]: return the mean of alpha over these rows. Rows that see
            no key count as zeros; without any row the mass is 0.
        causal: False: the rows come after all N positions, so that each sees every key but padding, and R is any
            number: a prefix that several sequences share. Two such results are joined by their log-sum-exps
            (`join`). Without segments and mass.
        backend: "triton", "cpu", "torch" or "auto"; see `mllm_fast.kernels.dispatch`.

    Returns:
        Attention(output, lse, mass); output in the operands' type, lse and mass in float32 (float64 for
        float64), None where not asked for. Sums are accumulated in float32.

    Raises:
        ValueError: names the argument, what it got and what it takes.
    """
    _check(query, key, value, segments, table, start, mass, causal)
    if scale is None:
        scale = query.shape[3] ** -0.5
    elif not 0 < scale < math.inf:
        raise ValueError(f"scale is a positive number, got {scale}")
    kernel = kernel_of("knockout_attention", query.device, query.dtype, backend)
    return Attention(*kernel.attention(query, key, value, segments, table, start, float(scale), lse, mass, causal))


def join(first: Attention, second: Attention) -> Tensor:
    """The output [B, H, R, D] of rows whose keys were split over two calls with `lse=True`.

    With l the two log-sum-exps: O = sum_i exp(l_i - logaddexp(l_1, l_2)) O_i; zeros where neither has a key.
    """
    logs = torch.stack([first.lse, second.lse])  # type: ignore[list-item]
    logs = logs - logs.amax(0).clamp_min(torch.finfo(logs.dtype).min)  # no key at all: -inf stays, not NaN
    weights = logs.exp()
    weights = (weights / weights.sum(0).clamp_min(torch.finfo(logs.dtype).tiny))[..., None]
    return (weights[0] * first.output + weights[1] * second.output).to(first.output.dtype)


def _check(query, key, value, segments, table, start, mass, causal) -> None:
    """Few questions to torch: decoding comes here once a layer and token, each time with cold caches."""
    shape, key_shape, dtype, device = query.shape, key.shape, query.dtype, query.device
    if not (
        len(shape) == len(key_shape) == len(value.shape) == 4
        and dtype == key.dtype == value.dtype
        and device == key.device == value.device
        and query.stride()[3] == key.stride()[3] == value.stride()[3] == 1
        and not (query.requires_grad or key.requires_grad or value.requires_grad)
    ):
        _check_each(query, key, value)
    batch, heads, rows, width = shape
    key_batch, kv_heads, keys, key_width = key_shape
    if not dtype.is_floating_point:
        raise ValueError(f"query is float16, bfloat16 or float32, got {dtype}")
    if not HEAD_SIZES[0] <= width <= HEAD_SIZES[1]:
        raise ValueError(f"query's head size is {HEAD_SIZES[0]} to {HEAD_SIZES[1]}, got {width}")
    if key_batch != batch or key_width != width:
        raise ValueError(f"key is [{batch}, Hkv, N, {width}] for query {list(shape)}, got {list(key_shape)}")
    if value.shape != key_shape:
        raise ValueError(f"value is {list(key_shape)} as key is, got {list(value.shape)}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query's heads are a multiple of key's, got {heads} and {kv_heads}")
    if not causal and (segments is not None or mass is not False):
        raise ValueError("causal=False goes without segments and mass")
    if causal and rows > keys:
        raise ValueError(f"query's rows are the last of key's positions, got {rows} rows and {keys} positions")
    if (segments is None) != (table is None):
        raise ValueError("segments and table go together: give both or neither")
    if segments is not None:
        if segments.shape not in ((batch, keys), (1, keys)) or segments.dtype != torch.uint8:
            raise ValueError(f"segments is uint8 [{batch}, {keys}], got {segments.dtype} {list(segments.shape)}")
        if table.shape != (SEGMENTS,) or table.dtype != torch.int32:
            raise ValueError(f"table is int32 [{SEGMENTS}], got {table.dtype} {list(table.shape)}")
    if start is not None and (start.shape != (batch,) or start.dtype != torch.int32):
        raise ValueError(f"start is int32 [{batch}], got {start.dtype} {list(start.shape)}")
    masses = mass if isinstance(mass, Tensor) else None
    if masses is None and not isinstance(mass, bool):
        raise ValueError(f"mass is True, False or bool [{batch}, {rows}], got {mass!r}")
    if masses is not None and (masses.shape != (batch, rows) or masses.dtype != torch.bool):
        raise ValueError(f"mass is True, False or bool [{batch}, {rows}], got {mass.dtype} {list(mass.shape)}")
    for name, tensor in (("segments", segments), ("table", table), ("start", start), ("mass", masses)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, query on {device}: move it there")


def _check_each(query, key, value) -> None:
    """What is wrong with the operands."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise ValueError(
                f"{name} has four dimensions, batch, heads, positions, head size; got {list(tensor.shape)}"
            )
        if tensor.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, which this kernel does not give: detach it, or use the model's own"
                " attention for training"
            )
        if tensor.stride(3) != 1 and tensor.shape[3] > 1:
            raise ValueError(f"{name} is not contiguous in its last dimension (stride {tensor.stride(3)}): copy it")
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, query {query.dtype}: give all in one type")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, query on {query.device}: move it there")
