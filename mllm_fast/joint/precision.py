"""Measure how well a detector finds things: precision and recall over all thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .detector import iou, kept_boxes

Scored = list[tuple[float, bool]]  # (score, whether it is right) of each box


def judge_boxes(logits: Tensor, boxes: Tensor, things: Sequence[tuple[int, Tensor]], lowest: float = 0.02) -> Scored:
    """Judge which boxes of one image are right.

    Only boxes that `kept_boxes` keeps for their query are judged. A box is right if it overlaps a thing of its query by
    an intersection over union of one half or more, and if no box of a higher score has found that thing.

    Args:
        logits: The logit of each box for each query, [n, queries].
        boxes: The boxes, [n, 4].
        things: The query and the box of each thing in the image.
        lowest: The lowest score of a box that is judged.

    Returns:
        The score of each judged box, and whether the box is right.
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
    """The judged boxes of all images.

    Attributes:
        scores: The scores of the boxes.
        right: Whether each box is right.
        things: The number of things in the images.
    """

    scores: np.ndarray
    right: np.ndarray
    things: int

    @classmethod
    def of(cls, pictures: Sequence[Scored], things: int) -> Found:
        every = [box for one in pictures for box in one]
        return cls(np.array([score for score, _ in every]), np.array([hit for _, hit in every], bool), things)

    def curve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the thresholds from high to low, and the precision and the recall at each."""
        order = np.argsort(-self.scores, kind="stable")
        hits = np.cumsum(self.right[order])
        return self.scores[order], hits / np.arange(1, len(hits) + 1), hits / self.things

    def recall_at(self, precision: float) -> tuple[float, float]:
        """Return the largest recall at this precision or more, and its threshold; (0, 1) if no threshold reaches it."""
        thresholds, precisions, recalls = self.curve()
        good = np.flatnonzero(precisions >= precision)
        return (float(recalls[good[-1]]), float(thresholds[good[-1]])) if len(good) else (0.0, 1.0)

    def average_precision(self) -> float:
        """Return the area under the precision-recall curve, with the precision made monotonic."""
        _, precisions, recalls = self.curve()
        best = np.maximum.accumulate(precisions[::-1])[::-1]
        return float(np.sum(np.diff(recalls, prepend=0.0) * best))
