"""Telling true from false by a score: the area under the curve, and a threshold that is tested elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


def auroc(scores: Sequence[float], truth: Sequence[bool]) -> float:
    """The chance that a true one has the higher score than a false one, ties counting half (the area under the receiver
    operating characteristic); NaN without any of either."""
    values, true = np.asarray(scores, float), np.asarray(truth, bool)
    high, low = values[true], np.sort(values[~true])
    if not len(high) or not len(low):
        return float("nan")
    below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return float(below.mean() / (2 * len(low)))


def best_threshold(scores: Sequence[float], truth: Sequence[bool]) -> float:
    """The score from which on "true" is said with the largest balanced accuracy; halfway between two that are there."""
    values, true = np.asarray(scores, float), np.asarray(truth, bool)
    edges = np.unique(values)
    cuts = np.concatenate([[edges[0]], (edges[1:] + edges[:-1]) / 2])
    kept = [np.mean(values[true] >= cut) + np.mean(values[~true] < cut) for cut in cuts]
    return float(cuts[int(np.argmax(kept))])


class Tested(NamedTuple):
    """A threshold, and on samples that did not choose it: of the true ones the share at or above it, of the false ones
    the share below it."""

    threshold: float
    true_kept: float
    false_flagged: float


def split_threshold(scores: Sequence[float], truth: Sequence[bool], first: Sequence[bool]) -> Tested | None:
    """Chosen on the `first` split, tested on the other; None where a split lacks either kind."""
    values, true, here = np.asarray(scores, float), np.asarray(truth, bool), np.asarray(first, bool)
    for part in (here, ~here):
        if not true[part].any() or true[part].all():
            return None
    cut = best_threshold(values[here], true[here])
    high, low = values[~here & true], values[~here & ~true]
    return Tested(cut, float(np.mean(high >= cut)), float(np.mean(low < cut)))
