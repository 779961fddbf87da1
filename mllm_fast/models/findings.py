"""What a probe finds in a model: its attention sites, and the paths of its parts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One attention of the decoder.

    Attributes:
        layer: The number of its decoder layer.
        attention, output: Paths of the attention module and of its output projection in the model.
        cache: Index of the layer of the KV cache that holds its keys and values, or None if the cache holds something
            else, from which they are made.
        num_heads, num_kv_heads: The number of query heads, and of key and value heads.
        key_dim, head_dim: The size of a key, and of a value.
        gated: Whether something multiplies the attention's output before the output projection.
        post_norm: Path of the norm between the output projection and the residual stream, or None.
        multiplier: The factor of what is added to the residual stream.
        window: How many positions a row of sliding attention sees, or None for all.
        problem: Why its writes are not what is added to the residual stream, or "".
    """

    layer: int
    attention: str
    output: str
    cache: int | None
    num_heads: int
    num_kv_heads: int
    key_dim: int
    head_dim: int
    gated: bool
    post_norm: str | None
    multiplier: float
    window: int | None
    problem: str


@dataclass(frozen=True)
class Findings:
    """The parts of a model, as paths and numbers.

    Attributes:
        decoder, layers, norm, head: Paths of the decoder, the list of its layers, the final norm and the unembedding.
        num_layers: How many layers the decoder has.
        sites: The attention of each layer that has one, in the order of the layers.
        others: What layers without attention have in its place, the name of a class by the number of the layer.
        logit_scale: The factor of the logits behind the unembedding.
        softcap: The soft cap of the logits, or None.
        state: Paths of what the model keeps about the current sequence outside its KV cache.
    """

    decoder: str
    layers: str
    norm: str
    head: str
    num_layers: int
    sites: tuple[Site, ...]
    others: dict[int, str]
    logit_scale: float
    softcap: float | None
    state: tuple[str, ...]
