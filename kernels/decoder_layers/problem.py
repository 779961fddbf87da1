"""What a pass over the layers of a decoder takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class NormWeights(NamedTuple):
    """A root mean square norm.

    Attributes:
        gain: [d], or None for no norm at all.
        eps: The number that is added to the mean square.
    """

    gain: Tensor | None
    eps: float = 0.0


class LinearWeights(NamedTuple):
    """A linear layer: weight [out, in], and bias [out] or None."""

    weight: Tensor
    bias: Tensor | None = None


class LayerWeights(NamedTuple):
    """The weights of one layer.

    Attributes:
        input_norm, middle_norm: The norms before attention and MLP, [d].
        query_norm, key_norm: Norms of each head's queries and keys before the rotation, [D].
        query, key, value, output, gate, up, down: The linear layers.
        scale: Factor of the scores.
    """

    input_norm: NormWeights
    query_norm: NormWeights
    key_norm: NormWeights
    middle_norm: NormWeights
    query: LinearWeights
    key: LinearWeights
    value: LinearWeights
    output: LinearWeights
    gate: LinearWeights
    up: LinearWeights
    down: LinearWeights
    scale: float


class KeyStore(NamedTuple):
    """Where the rows' own keys and values are written.

    Attributes:
        keys, values: L tensors each, [S, Hkv, N, D], of the same strides, the last one 1.
        places: Slot and position of each row, int64 [T, 2].
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    places: Tensor


class Part(NamedTuple):
    """Keys that some rows attend to. A row's attention is one softmax over what it sees in all parts.

    Attributes:
        keys, values: L tensors each, [S, Hkv, N, D], of the same strides, the last one 1.
        entries: int64 [E, 5], an entry for each row that attends: the row, the slot, the first key and the one behind
            the last, and the row's own position among the keys, which only a mask reads. Entries of one slot follow
            each other.
        masks: For each layer None, or the segment of each key, uint8 [S or 1, N], and the table of closed segments,
            int32 [32], as `knockout_attention` takes them; empty for no mask at all.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    entries: Tensor
    masks: Sequence[tuple[Tensor, Tensor] | None] = ()


class DecoderOutput(NamedTuple):
    """The result of a pass.

    Attributes:
        hidden: What the last layer gives, [T, d], or [W, d] of the W needed rows.
        normed: The same behind the final norm.
        residual: Input of every layer at the recorded rows, [R, L, d], or None.
        query: Their rotated queries, [R, L, H, D], or None.
        output: Their attention outputs before the output projection, [R, L, H, D], or None.
    """

    hidden: Tensor
    normed: Tensor
    residual: Tensor | None
    query: Tensor | None
    output: Tensor | None
