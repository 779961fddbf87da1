"""Training images, and the embeddings that the two models compute for a batch of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..core.images import image_files, load_image
from ..shapes.scenes import generate_scene
from .grids import resample, single_tile
from .image_features import own_features

if TYPE_CHECKING:
    from ..vlm import VLM
    from .detector import Detector


class Pictures(Protocol):
    """A sequence of images.

    Attributes:
        origin: Where the images come from, as plain JSON.
    """

    origin: dict[str, Any]

    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> Image.Image: ...


class Folder:
    """The images of a folder and of its subfolders, read when they are needed.

    Args:
        folder: The folder.
        count: The number of images to use, the first ones by name; by default, all.

    Raises:
        InputError: If there is no such folder, or no image in it.
    """

    def __init__(self, folder: Path, count: int | None = None):
        self._paths = image_files(folder)[:count]
        self.origin: dict[str, Any] = {"folder": str(folder), "count": len(self._paths)}

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> Image.Image:
        return load_image(self._paths[number])


class Scenes:
    """Generated scenes, made when they are needed; each depends only on the seed and on its number."""

    def __init__(self, count: int, seed: int = 0):
        self._count, self._seed = count, seed
        self.origin: dict[str, Any] = {"scenes": seed, "count": count}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Image.Image:
        return generate_scene(np.random.default_rng([self._seed, number])).image


@torch.no_grad()
def embeddings(owl: Detector, vlm: VLM, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
    """Compute the inputs and the targets of W for some images.

    Returns:
        E without the class token on the language model's grid, [B, tokens, d], and the language model's own image
        embeddings, [B, tokens, d_text]. Both are float32.

    Raises:
        InputError: If an image has several tiles or is smaller than a patch.
    """
    inputs, layouts, _ = vlm.prompts.prepare([[image] for image in images], ["?"] * len(images))
    visions = owl.see_many(images)
    tiles = [single_tile(layout.images[0].tiles) for layout in layouts]
    given = [
        resample(vision.tokens[1:].clone(), vision.tile, tile) for vision, tile in zip(visions, tiles, strict=True)
    ]
    return torch.stack(given).float(), own_features(vlm, inputs).float()
