"""Measures of how well a score tells true from false: the area under the ROC curve, and thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


def auroc(scores: Sequence[float], truth: Sequence[bool]) -> float:
    """Return the area under the receiver operating characteristic (AUROC).

    It is the chance that a true sample has a higher score than a false one. Ties count half.

    Returns:
        The area, or NaN if there are no true samples or no false ones.
    """
    values, true = np.asarray(scores, float), np.asarray(truth, bool)
    high, low = values[true], np.sort(values[~true])
    if not len(high) or not len(low):
        return float("nan")
    below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return float(below.mean() / (2 * len(low)))


def best_threshold(scores: Sequence[float], truth: Sequence[bool]) -> float:
    """Return the threshold with the largest balanced accuracy. A score at or above it means "true".

    The candidates are the lowest score and the points halfway between two neighbouring scores.
    """
    values, true = np.asarray(scores, float), np.asarray(truth, bool)
    edges = np.unique(values)
    cuts = np.concatenate([[edges[0]], (edges[1:] + edges[:-1]) / 2])
    kept = [np.mean(values[true] >= cut) + np.mean(values[~true] < cut) for cut in cuts]
    return float(cuts[int(np.argmax(kept))])


class Tested(NamedTuple):
    """A threshold, and how it does on samples that were not used to choose it.

    Attributes:
        threshold: The threshold.
        true_kept: The share of the true samples with a score at or above the threshold.
        false_flagged: The share of the false samples with a score below the threshold.
    """

    threshold: float
    true_kept: float
    false_flagged: float


def split_threshold(scores: Sequence[float], truth: Sequence[bool], first: Sequence[bool]) -> Tested | None:
    """Choose a threshold on one split of the samples, and test it on the other.

    Args:
        scores: A score for each sample.
        truth: Whether each sample is true.
        first: Whether each sample is in the first split, which chooses the threshold.

    Returns:
        The tested threshold, or None if a split lacks true samples or false ones.
    """
    values, true, here = np.asarray(scores, float), np.asarray(truth, bool), np.asarray(first, bool)
    for part in (here, ~here):
        if not true[part].any() or true[part].all():
            return None
    cut = best_threshold(values[here], true[here])
    high, low = values[~here & true], values[~here & ~true]
    return Tested(cut, float(np.mean(high >= cut)), float(np.mean(low < cut)))
