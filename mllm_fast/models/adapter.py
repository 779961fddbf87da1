"""The differences between architectures: where a model keeps its parts, and how its processor lays out image tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core.errors import InputError
from ..core.layout import Tile
from .offload import weight_of

Tiling = tuple[tuple[Tile, ...], tuple[int, int]]  # tiles in token order, and (rows, cols) of the canvas


@dataclass(frozen=True)
class FinalNorm:
    """The parameters of a decoder's final norm.

    Attributes:
        kind: "rms" or "layer".
        gain: The weight, [d].
        bias: The bias, [d], or None.
        eps: The number that is added to the mean square.
    """

    kind: str
    gain: torch.Tensor
    bias: torch.Tensor | None
    eps: float


class Adapter:
    """One architecture. Subclass it, set what differs from the defaults, and register it with `@architecture`.

    Attributes:
        model_type: The model type in the model's config.json.
        text_types: The `model_type` of each language model that the architecture may contain.
        decoder, unembedding: Dotted paths from the model to the decoder and to the unembedding.
        attention: Path from a decoder layer to its attention module.
        output: Path from the attention module to the output projection.
        state: Dotted paths to what the model keeps about the current sequence outside the KV cache.
        fixed_grid: Whether every image gets the same number of tokens, as a joint model needs.
    """

    model_type: str = ""
    text_types: tuple[str, ...] = ()
    decoder: str = "model.language_model"
    unembedding: str = "lm_head"
    attention: str = "self_attn"
    output: str = "o_proj"
    state: tuple[str, ...] = ()
    fixed_grid: bool = False

    def tiles(self, processor: Any, inputs: Any, index: int, size: tuple[int, int]) -> Tiling:
        """Return the tiles that the tokens of an image cover.

        Args:
            processor: The model's processor.
            inputs: The processor's output for the batch.
            index: Index of the image in the batch.
            size: (width, height) of the original image in pixels.

        Returns:
            The tiles in the order of their tokens, and how many of them lie side by side, (rows, cols).
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how image tokens lie: define tiles()")

    def image_token_id(self, processor: Any) -> int:
        """Return the id of the token that stands for one piece of an image."""
        return processor.image_token_id

    def image_lengths(self, processor: Any, inputs: Mapping[str, Any], tokens: int) -> list[int] | None:
        """Return how many tokens each image has, or None if other tokens separate the images.

        Args:
            processor: The model's processor.
            inputs: The arguments of a call of the model.
            tokens: How many image tokens the call has in all.
        """
        return None

    def image_features(self, embeddings: torch.Tensor) -> Any:
        """Return image embeddings [images, tokens, d] in the form of the model's `get_image_features`.

        It is needed only for architectures with a fixed grid.
        """
        return embeddings

    def final_norm(self, norm: nn.Module) -> FinalNorm:
        """Return the parameters of the final norm.

        Raises:
            InputError: The norm is neither a LayerNorm nor an RMSNorm with a weight and an epsilon.
        """
        module: Any = norm
        if isinstance(norm, nn.LayerNorm):
            return FinalNorm("layer", weight_of(module), detached(module.bias), module.eps)
        if hasattr(module, "variance_epsilon") and hasattr(module, "weight"):
            return FinalNorm("rms", weight_of(module), detached(getattr(module, "bias", None)), module.variance_epsilon)
        raise InputError(
            f"the final norm is a {type(norm).__name__}: scores know LayerNorm, and RMSNorm with a weight and a"
            " variance_epsilon; see docs/extending.md, 'An architecture'"
        )


def detached(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """Return a parameter detached from the graph, or None for None."""
    return None if parameter is None else parameter.detach()
