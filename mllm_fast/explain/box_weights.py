"""Boxes of a detector, weighted by how far they agree with a word."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core.layout import Box


@dataclass(frozen=True)
class BoxWeights:
    """The boxes of one query, weighted by how far they agree with one word; all tensors are on the CPU.

    Attributes:
        query: the text that the detector looks for.
        weights: the weights, 0 to 1, float32 [n].
        cosines: the weights before scaling, -1 to 1, [n].
        scores: the detector's scores, 0 to 1, [n].
        boxes: left, top, right and bottom in pixels of the image, [n, 4].
        size: (width, height) of the image.
        note: how the weights were computed, if not in the usual way.
    """

    query: str
    weights: Tensor
    cosines: Tensor
    scores: Tensor
    boxes: Tensor
    size: tuple[int, int]
    note: str = ""

    def pixels(self, size: tuple[int, int] | None = None) -> Tensor:
        """Return the saliency of each pixel, float32 [height, width].

        `size` (width, height) sets another resolution than the image's own.
        """
        width, height = size or self.size
        scale = np.array([width / self.size[0], height / self.size[1]] * 2)
        # a box covers a pixel if the pixel's centre lies in it
        edges = np.ceil(self.boxes.double().numpy() * scale - 0.5).clip(0, [width, height] * 2).astype(int)
        found = np.zeros((height, width), np.float32)
        for i in self.weights.argsort(stable=True).tolist():
            left, top, right, bottom = edges[i]
            found[top:bottom, left:right] = float(self.weights[i])
        return torch.from_numpy(found)

    def best(self, k: int = 5) -> list[tuple[float, float, Box]]:
        """Return the k boxes of largest weight as a list of (weight, score, box), largest weight first."""
        order = self.weights.argsort(descending=True, stable=True)[:k].tolist()
        return [(float(self.weights[i]), float(self.scores[i]), tuple(self.boxes[i].tolist())) for i in order]
