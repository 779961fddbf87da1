"""What cannot be found by running a model: how its processor lays out the tokens of an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..core.errors import InputError
from ..core.layout import Tile, Tiling


class Adapter:
    """The image layout of one architecture. Subclass it, and register it with `@architecture`.

    A model whose type has no adapter gets this class itself. Its answers, scores, knockouts and contexts work. Only
    heatmaps need `tiles`.

    Attributes:
        model_types: The model types in config.json that this adapter is for.
        fixed_grid: Whether every image gets the same number of tokens, as a joint model needs.
        mixes: Whether one prompt may hold images beside videos that the video processor reads.
    """

    model_types: tuple[str, ...] = ()
    fixed_grid: bool = False
    mixes: bool = True

    @property
    def knows_tiles(self) -> bool:
        """Whether the adapter says how image tokens lie, so that heatmaps can be drawn."""
        return type(self).tiles is not Adapter.tiles

    def tiles(self, processor: Any, inputs: Any, index: int, size: tuple[int, int]) -> Tiling:
        """Return the tiles that the tokens of an image cover.

        Args:
            processor: The model's processor.
            inputs: The processor's output for the batch.
            index: Index of the image in the batch.
            size: (width, height) of the original image in pixels.

        Returns:
            The tiles in the order of their tokens, and which of them lie side by side.
        """
        raise InputError(f"{type(self).__name__} does not say how image tokens lie: define tiles()")

    @property
    def knows_videos(self) -> bool:
        """Whether the adapter says how the tokens of a video lie, which the model's video processor reads."""
        return type(self).moments is not Adapter.moments

    def moments(
        self, processor: Any, inputs: Any, index: int, frames: int, size: tuple[int, int]
    ) -> list[tuple[range, Tiling]]:
        """Return which frames of a video each group of its tokens stands for, and the tiles that they cover.

        Args:
            processor: The model's processor.
            inputs: The processor's output for the batch.
            index: Index of the video in the batch.
            frames: How many frames of the video the model reads.
            size: (width, height) of the original frames in pixels.

        Returns:
            In the order of time: the frames, and the tiles in the order of their tokens.
        """
        raise InputError(f"{type(self).__name__} does not say how the tokens of videos lie: define moments()")

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


def whole_frames(frames: int, rows: int, cols: int, size: tuple[int, int]) -> list[tuple[range, Tiling]]:
    """Return the moments of a video of which each frame has one grid of tokens over all of it."""
    tile = Tile(rows, cols, (0.0, 0.0, float(size[0]), float(size[1])))
    return [(range(i, i + 1), Tiling((tile,))) for i in range(frames)]
