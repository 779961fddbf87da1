"""How well a detector finds what is there: precision and recall over all thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .detector import iou, kept_boxes

Scored = list[tuple[float, bool]]  # a box's score, and whether it is right


def judge_boxes(logits: Tensor, boxes: Tensor, things: Sequence[tuple[int, Tensor]], lowest: float = 0.02) -> Scored:
    """Of one image the boxes of `lowest` score or more that no better box of their query overlaps, see `kept_boxes`.
    logits: [n, queries]; boxes: [n, 4]; things: (query, box) of what is there.

    A box is right if it overlaps a thing of its query by an intersection over union of one half or more, one that no
    box of a higher score has found.
    """
    left: dict[int, list[Tensor]] = {}
    for query, box in things:
        left.setdefault(query, []).append(box.to(boxes))
    chance, overlaps = logits.sigmoid(), iou(boxes[:, None], boxes)
    found: Scored = []
    for query in (chance >= lowest).any(0).nonzero()[:, 0].tolist():
        there = left.get(query, [])
        for token in kept_boxes(chance[:, query], overlaps, lowest):
            fits = iou(boxes[token], torch.stack(there)) if there else torch.zeros(1)
            hit = float(fits.max()) >= 0.5
            if hit:
                there.pop(int(fits.argmax()))
            found.append((float(chance[token, query]), hit))
    return found


class Found(NamedTuple):
    """`scores` of the boxes of all images, whether each is right, and how many things there are."""

    scores: np.ndarray
    right: np.ndarray
    things: int

    @classmethod
    def of(cls, pictures: Sequence[Scored], things: int) -> Found:
        every = [box for one in pictures for box in one]
        return cls(np.array([score for score, _ in every]), np.array([hit for _, hit in every], bool), things)

    def curve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Thresholds from high to low, and precision and recall at each."""
        order = np.argsort(-self.scores, kind="stable")
        hits = np.cumsum(self.right[order])
        return self.scores[order], hits / np.arange(1, len(hits) + 1), hits / self.things

    def recall_at(self, precision: float) -> tuple[float, float]:
        """The largest recall at this precision or more, and the threshold it is reached at; 0 and 1 if at none."""
        thresholds, precisions, recalls = self.curve()
        good = np.flatnonzero(precisions >= precision)
        return (float(recalls[good[-1]]), float(thresholds[good[-1]])) if len(good) else (0.0, 1.0)

    def average_precision(self) -> float:
        """The area under the curve of precision, made monotonic, over recall."""
        _, precisions, recalls = self.curve()
        best = np.maximum.accumulate(precisions[::-1])[::-1]
        return float(np.sum(np.diff(recalls, prepend=0.0) * best))
