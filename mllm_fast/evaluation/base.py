"""What an evaluation is: rows for a sample, and a report from all rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .report import Report
from .rows import Row
from .samples import Sample

if TYPE_CHECKING:
    from ..vlm import VLM
    from .judges.judge import Judge, NounJudge


@dataclass(frozen=True)
class EvaluationOptions:
    """What `mllm-fast eval` was asked; each evaluation takes what it knows.

    Attributes:
        prompt: what the model is asked. max_new_tokens: the longest answer.
        words: the objects to look for, None for those of the generated scenes. judge: of descriptions, None likewise.
        reader: a language model that answers from descriptions. price: of a million of its tokens, in dollars.
        shares: of the image tokens that contexts keep. reference: what descriptions are compared with.
        question, statement, second_model: of "heads".
    """

    prompt: str = "Describe the image."
    max_new_tokens: int = 64
    words: NounJudge | None = None
    judge: Judge | None = None
    reader: Any = None
    price: float | None = None
    shares: tuple[float, ...] = ()
    reference: str = "answer"
    question: str = "what color is the {noun}?"
    statement: str = "the {noun} is {attribute}."
    second_model: str | None = None


class Evaluation(ABC):
    """One figure of a paper. Subclass it, and register it with `@evaluation`.

    Attributes:
        name: as in `mllm-fast eval NAME`. title: of the report.
        needs_masks: whether it must know where the objects of its images are.
        benchmark: whose questions it asks, "mme" or "pope"; "" for an evaluation of images alone.
        settings: plain JSON; they decide the rows together with the model and the sample.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    needs_masks: ClassVar[bool] = False
    benchmark: ClassVar[str] = ""
    settings: dict[str, Any] = {}  # noqa: RUF012

    @classmethod
    def from_options(cls, options: EvaluationOptions) -> Evaluation:
        """The evaluation that the command line asks for; by default one without arguments."""
        return cls()

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
