"""What an evaluation is: rows for a sample, and a report from all rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .report import Report
from .rows import Row
from .samples import Sample

if TYPE_CHECKING:
    from ..vlm import VLM


class Evaluation(ABC):
    """One figure of a paper. `settings`, plain JSON, decide its rows together with the model and the sample."""

    name: ClassVar[str]
    title: ClassVar[str]
    settings: dict[str, Any]

    @abstractmethod
    def rows(self, vlm: VLM, sample: Sample) -> list[Row]:
        """The rows of one sample, plain JSON without NaN; the same whatever came before.

        Raises:
            InputError, OSError: the sample cannot be used. EndsRunError: nor can any other.
        """

    @abstractmethod
    def findings(self, rows: dict[str, list[Row]]) -> Report:
        """The report on the rows of the samples that could be used, one or more."""

    def report(self, rows: dict[str, list[Row]]) -> Report:
        """The report on all samples, with why some could not be used."""
        failed = {name: one[0]["error"] for name, one in rows.items() if is_failed(one)}
        used = {name: one for name, one in rows.items() if name not in failed}
        found = self.findings(used) if used else self.nothing("No sample could be used.")
        return replace(found, failed=failed)

    def nothing(self, why: str) -> Report:
        """A report without figures."""
        return Report(self.name, self.title, [why], [], [], {})


def is_failed(rows: Sequence[Row]) -> bool:
    """Are these the rows of a sample that could not be used?"""
    return bool(rows) and "error" in rows[0]


def is_open(rows: Sequence[Row]) -> bool:
    """Is there a row of these that a judge or a reader gave no answer for?"""
    return any("unjudged" in row or "unanswered" in row for row in rows)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, s / sqrt(n) with n - 1 in s; NaN where there are too few values for it."""
    array = np.asarray(values, float)
    if not len(array):
        return float("nan"), float("nan")
    error = array.std(ddof=1) / len(array) ** 0.5 if len(array) > 1 else float("nan")
    return float(array.mean()), float(error)
