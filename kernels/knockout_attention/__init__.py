"""Causal attention under a segment mask (arXiv 2411.17491, equation 3).

    O_r = sum_k alpha_rk v_k,    alpha_r = softmax over the keys k that row r sees of s_rk,    s_rk = scale q_r . k_k

With a soft cap c the scores are c tanh(s_rk / c) (Gemma Team 2024, arXiv 2408.00118). With an attention sink z_h the
softmax of a head has one more score, z_h, which takes weight and gives no value (OpenAI 2025, arXiv 2508.10925).

Row r sees key k if k is not after r, k is not left padding, and bit s_k of table[s_r] is 0, where s are the segment
ids. The output of a row that sees no key is zero. A block of keys that no row of a row block sees is never read, so the
cost follows the pairs that remain. No array of rows x keys is stored.

The same call can return the log-sum-exp of each row's scores, and the attention mass of each key. The attention mass is
the mean of alpha over chosen rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..dispatch import kernel_of, wide_type
from ..paths import path_of
from . import sdpa

__all__ = ["SEGMENTS", "Attention", "join", "knockout_attention", "segment_table"]

SEGMENTS = 32
HEAD_SIZES = (16, 256)


class Attention(NamedTuple):
    """The result of `knockout_attention`.

    Attributes:
        output: Attention output, [B, H, R, D], a view of [B, R, H, D].
        lse: Log-sum-exp of the scores of each row, its sink's included, [B, H, R], or None.
        mass: Attention mass of each key, [B, H, N], or None.
    """

    output: Tensor
    lse: Tensor | None
    mass: Tensor | None


def segment_table(rules: Iterable[tuple[int, int]], device: torch.device | str = "cpu") -> Tensor:
    """Make the table of a set of rules, which block attention between segments.

    Args:
        rules: Pairs (source, target). Rows of segment `target` may not see keys of segment `source`.
        device: Device of the table.

    Returns:
        int32 [32]; bit s of entry t is set for the rule (s, t).

    Raises:
        ValueError: A segment id is not in 0 .. 31.
    """
    words = [0] * SEGMENTS
    for source, target in rules:
        if not (0 <= source < SEGMENTS and 0 <= target < SEGMENTS):
            raise ValueError(f"segment ids are 0 .. {SEGMENTS - 1}, got the rule ({source}, {target})")
        words[target] |= 1 << source
    return torch.tensor([w - (w >> 31 << 32) for w in words], dtype=torch.int32, device=device)


@without_autocast
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
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> Attention:
    """Compute the attention of the last R of N positions, R <= N, under a segment mask. Inference only.

    Args:
        query: [B, H, R, D] with D from 16 to 256, in float16, bfloat16 or float32 (plain torch also takes float64).
        key, value: [B, Hkv, N, D]; H is a multiple of Hkv. The stride of D is 1; the other strides are free.
        segments: Segment id of each position, 0 to 31, uint8 [B, N], or [1, N] for the whole batch. The ids are not
            checked on a GPU. `segments` and `table` are given together.
        table: The blocked segments of each segment, int32 [32]; see `segment_table`.
        start: First position of each sequence that is not left padding, int32 [B].
        scale: Factor of the scores, D ** -0.5 by default.
        lse: Whether to return the log-sum-exp (natural logarithm) of the scores of each row. It is -inf for a row that
            sees no key, or the head's sink.
        mass: Whether to return the mean of alpha over rows. True counts all rows, bool [B, R] selects the rows to
            count. Rows that see no key count as zeros. The mass is 0 if no row is selected.
        causal: If False, all rows come after all N positions, so that each row sees every key except padding, and R
            is any number. This serves a prefix that several sequences share: `join` merges two results by their
            log-sum-exps. It excludes `segments` and `mass`.
        softcap: Soft cap of the scores, or None.
        sinks: Score of each head's attention sink, floating [H], or None. Of two calls that `join` merges, one takes
            the sinks.
        backend: "triton", "cpu", "torch" or "auto"; see `mllm_fast.kernels.dispatch`.

    Returns:
        Attention(output, lse, mass). `output` has the dtype of the operands. `lse` and `mass` are float32 (float64
        for float64), or None where they are not requested. Sums are accumulated in float32.

    Raises:
        ValueError: An argument is not valid. The message names the argument, what it got and what it takes.
    """
    _check(query, key, value, segments, table, start, mass, causal)
    if scale is None:
        scale = query.shape[3] ** -0.5
    elif not 0 < scale < math.inf:
        raise ValueError(f"scale is a positive number, got {scale}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap is a positive number or None, got {softcap}")
    if sinks is not None:
        sinks = _checked_sinks(sinks, query)
    kernel = kernel_of("knockout_attention", query.device, query.dtype, backend)
    if backend == "auto" and kernel.__name__.endswith(".cpu_kernel"):
        plain = not lse and mass is False and softcap is None and sinks is None
        if plain and path_of("knockout_attention", query.dtype, kernel.kind_of(query.shape[2])) == "torch":
            output = sdpa.attention(query, key, value, segments, table, start, float(scale), causal)
            return Attention(output, None, None)
    return Attention(
        *kernel.attention(query, key, value, segments, table, start, float(scale), lse, mass, causal, softcap, sinks)
    )


@without_autocast
def join(first: Attention, second: Attention) -> Tensor:
    """Merge the results of two calls with `lse=True` that split the keys of the same rows between them.

    With the log-sum-exps l_1 and l_2 of the two calls:

        O = sum_i exp(l_i - logaddexp(l_1, l_2)) O_i

    Args:
        first: Result for one part of the keys.
        second: Result for the other part of the keys.

    Returns:
        The output over all keys, [B, H, R, D], with zeros for rows that see no key in either part.
    """
    logs = torch.stack([first.lse, second.lse])  # type: ignore[list-item]
    logs = logs - logs.amax(0).clamp_min(torch.finfo(logs.dtype).min)  # -inf, not NaN, for a row without any key
    weights = logs.exp()
    weights = (weights / weights.sum(0).clamp_min(torch.finfo(logs.dtype).tiny))[..., None]
    return (weights[0] * first.output + weights[1] * second.output).to(first.output.dtype)


def _check(query, key, value, segments, table, start, mass, causal) -> None:
    """Check the arguments with few calls to torch: decoding runs this once per layer and token, with cold caches."""
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


def _checked_sinks(sinks: Tensor, query: Tensor) -> Tensor:
    """Return the sinks in the type in which the scores are computed, contiguous."""
    if sinks.shape != query.shape[1:2] or not sinks.dtype.is_floating_point:
        raise ValueError(f"sinks is floating [{query.shape[1]}], got {sinks.dtype} {list(sinks.shape)}")
    if sinks.device != query.device:
        raise ValueError(f"sinks is on {sinks.device}, query on {query.device}: move it there")
    return sinks.detach().to(wide_type(query.dtype)).contiguous()


def _check_each(query, key, value) -> None:
    """Raise the error that says what is wrong with the operands."""
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
