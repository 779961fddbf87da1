"""The layers of a decoder over the few rows of a decoding step.

    y = norm(h),    q, k, v = rotary(W_q y), rotary(W_k y), W_v y
    h = h + W_o attention(q, K, V),    h = h + W_down (act(W_gate z) * W_up z),    z = norm(h)

for one layer after the other: root mean square norms before attention and MLP, queries and keys that may have a norm of
their own, rotary positions, grouped heads and a gated MLP (Touvron et al. 2023, arXiv 2302.13971). The weights are read
where they lie. A pass is one call, in which the threads meet between two phases without a call to the runtime.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import kernel_of
from .problem import DecoderOutput, KeyStore, LayerWeights, LinearWeights, NormWeights, Part

__all__ = [
    "ACTIVATIONS",
    "DecoderLayers",
    "DecoderOutput",
    "KeyStore",
    "LayerWeights",
    "LinearWeights",
    "NormWeights",
    "Part",
]

ACTIVATIONS = ("silu", "gelu_tanh")
LANES = 16  # every size is a multiple of it


class DecoderLayers:
    """The layers of one decoder, ready to be run. Inference only.

    Args:
        layers: The weights of the layers, all of the same sizes, dtype and device. They are kept, not copied.
        final: The final norm.
        heads, kv_heads: How many heads of queries, and of keys and values.
        activation: "silu" or "gelu_tanh".
        backend: "cpu", "torch" or "auto"; see `mllm_fast.kernels.dispatch`.

    Raises:
        ValueError: An argument is not valid. The message names the argument, what it got and what it takes.
    """

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        final: NormWeights,
        heads: int,
        kv_heads: int,
        activation: str = "silu",
        *,
        backend: str = "auto",
    ):
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if not layers or heads % kv_heads:
            raise ValueError(f"there is a layer, and heads is a multiple of kv_heads, got {heads} and {kv_heads}")
        self.layers, self.final = tuple(layers), final
        self.heads, self.kv_heads, self.activation = heads, kv_heads, activation
        first = layers[0]
        self.hidden, self.inner = first.query.weight.shape[1], len(first.gate.weight)
        self.width = len(first.query.weight) // heads
        self._check_weights()
        weight = first.query.weight
        self.dtype, self.device = weight.dtype, weight.device
        kernel = kernel_of("decoder_layers", weight.device, weight.dtype, backend)
        if kernel.__name__.endswith(".cpu_kernel"):
            odd = {size for size in (self.hidden, self.inner, self.width) if size % LANES}
            if odd:
                if backend == "cpu":
                    raise ValueError(f"backend 'cpu' takes sizes that are multiples of {LANES}, got {sorted(odd)}")
                kernel = kernel_of("decoder_layers", weight.device, weight.dtype, "torch")
        self.backend = kernel.__name__.rpartition(".")[2].removesuffix("_kernel")
        self._run = kernel.prepare(self)

    @torch.no_grad()
    def __call__(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        store: KeyStore,
        parts: Sequence[Part],
        recorded: Sequence[int] = (),
        needed: Sequence[int] | None = None,
    ) -> DecoderOutput:
        """Run the layers on T rows.

        Args:
            hidden: Input rows, [T, d]. They are not changed.
            cos, sin: Rotation of each row, [T, Dr]; the first Dr channels of a head turn, the first half of them
                against the second.
            store: Where the rows' keys and values are written, before any row attends.
            parts: What the rows attend to, `store` included if they do.
            recorded: The rows that are recorded.
            needed: The rows whose result is read, those recorded among them; None for all. The last layer computes no
                more of the others than their keys and values.

        Raises:
            ValueError: An argument is not valid.
        """
        self._check(hidden, cos, sin, store, parts, recorded)
        if needed is not None:
            if not all(0 <= row < len(hidden) for row in needed) or len(set(needed)) < len(needed):
                raise ValueError(f"needed names different rows, 0 to {len(hidden) - 1}, got {list(needed)}")
            if not set(recorded) <= set(needed):
                raise ValueError(f"recorded rows are needed, got {list(recorded)} of {list(needed)}")
            if len(needed) == len(hidden) and all(row == i for i, row in enumerate(needed)):
                needed = None
        return self._run(hidden, cos, sin, store, parts, recorded, needed)

    def _check_weights(self) -> None:
        d, queries, keys = self.hidden, self.heads * self.width, self.kv_heads * self.width
        wanted = {
            "query": (queries, d), "key": (keys, d), "value": (keys, d), "output": (d, queries),
            "gate": (self.inner, d), "up": (self.inner, d), "down": (d, self.inner),
        }  # fmt: skip
        like = self.layers[0].query.weight
        norms = {"input_norm": d, "middle_norm": d, "query_norm": self.width, "key_norm": self.width}
        for i, layer in enumerate(self.layers):
            for name, shape in wanted.items():
                weight, bias = getattr(layer, name)
                self._check_one(f"{name} of layer {i}", weight, shape, like)
                if bias is not None:
                    self._check_one(f"the bias of {name} of layer {i}", bias, shape[:1], like)
            for name, size in norms.items():
                gain = getattr(layer, name).gain
                if gain is not None:
                    self._check_one(f"{name} of layer {i}", gain, (size,), like)
                elif size == d:
                    raise ValueError(f"{name} of layer {i} has a gain, got None")
        if self.final.gain is None:
            raise ValueError("final has a gain, got None")
        self._check_one("final", self.final.gain, (d,), like)

    def _check_one(self, name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
        if tensor.shape != shape or tensor.dtype != like.dtype or tensor.device != like.device:
            raise ValueError(
                f"{name} is {like.dtype} {list(shape)} on {like.device}, got {tensor.dtype} {list(tensor.shape)} on"
                f" {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is contiguous, got strides {tensor.stride()}")

    def _check(self, hidden, cos, sin, store, parts, recorded) -> None:
        """Check the arguments with few calls to torch: this runs once a token."""
        rows = len(hidden)
        if hidden.ndim != 2 or hidden.shape[1] != self.hidden or hidden.dtype != self.dtype:
            raise ValueError(f"hidden is {self.dtype} [T, {self.hidden}], got {hidden.dtype} {list(hidden.shape)}")
        if cos.shape != sin.shape or len(cos) != rows or cos.shape[-1] % 2 or cos.shape[-1] > self.width:
            raise ValueError(
                f"cos and sin are [{rows}, Dr] with Dr even and at most {self.width}, got {list(cos.shape)} and"
                f" {list(sin.shape)}"
            )
        if cos.dtype != self.dtype or sin.dtype != self.dtype:
            raise ValueError(f"cos and sin are {self.dtype}, got {cos.dtype} and {sin.dtype}")
        if not all(0 <= row < rows for row in recorded):
            raise ValueError(f"recorded names rows, 0 to {rows - 1}, got {list(recorded)}")
        if store.places.shape != (rows, 2) or store.places.dtype != torch.int64:
            raise ValueError(f"places is int64 [{rows}, 2], got {store.places.dtype} {list(store.places.shape)}")
        self._check_keys("store", store.keys, store.values)
        for part in parts:
            self._check_keys("a part", part.keys, part.values)
            entries = part.entries
            if entries.ndim != 2 or entries.shape[1] != 5 or entries.dtype != torch.int64:
                raise ValueError(f"entries is int64 [E, 5], got {entries.dtype} {list(entries.shape)}")
            if part.masks:
                self._check_masks(part)

    def _check_masks(self, part: Part) -> None:
        if len(part.masks) != len(self.layers):
            raise ValueError(f"masks has one entry a layer, {len(self.layers)}, got {len(part.masks)}")
        slots, _, count, _ = part.keys[0].shape
        for segments, table in (mask for mask in part.masks if mask is not None):
            if segments.dtype != torch.uint8 or segments.ndim != 2 or len(segments) not in (1, slots):
                raise ValueError(f"segments is uint8 [1 or {slots}, N], got {segments.dtype} {list(segments.shape)}")
            if segments.shape[1] > count or table.dtype != torch.int32 or table.shape != (32,):
                raise ValueError(
                    f"segments has at most {count} keys and table is int32 [32], got {list(segments.shape)} and"
                    f" {table.dtype} {list(table.shape)}"
                )

    def _check_keys(self, name: str, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        shape, strides = keys[0].shape, keys[0].stride()
        if len(keys) != len(self.layers) or len(values) != len(keys):
            raise ValueError(f"{name} has keys and values of {len(self.layers)} layers, got {len(keys)}, {len(values)}")
        if len(shape) != 4 or shape[1] != self.kv_heads or shape[3] != self.width or strides[3] != 1:
            raise ValueError(
                f"the keys of {name} are [S, {self.kv_heads}, N, {self.width}] with the last stride 1, got"
                f" {list(shape)} and {strides}"
            )
        for one in (*keys, *values):
            if one.shape != shape or one.stride() != strides or one.dtype != self.dtype:
                raise ValueError(
                    f"the keys and values of {name} are {self.dtype} {list(shape)} with strides {strides}, got"
                    f" {one.dtype} {list(one.shape)} and {one.stride()}"
                )
