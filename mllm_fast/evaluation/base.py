"""The base class of all evaluations, which makes rows from each sample and a report from all rows."""

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
    """The options of `mllm-fast eval`. Each evaluation takes the options that it knows.

    Attributes:
        prompt: The prompt for the model.
        max_new_tokens: The largest number of tokens in a description, or None for the evaluation's own default.
        words: The vocabulary of objects to look for. None stands for that of the generated scenes.
        judge: The judge of descriptions. None stands for that of the generated scenes.
        reader: A language model that answers questions from descriptions.
        price: The price of a million tokens of the judge or the reader, in dollars.
        shares: The shares of the image tokens that contexts keep.
        reference: What descriptions are compared with.
        question, statement, second_model, prefix, chat_template: Options of the evaluations "heads" and "evidence".
        bands: The bands of layers that "knockout-sweep" leaves open.
        tasks: The tasks of MME that count.
        objects, segmenter: Options of the evaluation "localisation".
        apart: An option of the evaluation "attention-share".
        parser: How the answers to yes-or-no questions are read, "mme" or "first".
    """

    prompt: str = "Describe the image."
    max_new_tokens: int | None = None
    words: NounJudge | None = None
    judge: Judge | None = None
    reader: Any = None
    price: float | None = None
    shares: tuple[float, ...] = ()
    reference: str = "answer"
    question: str = "what color is the {noun}?"
    statement: str = "the {noun} is {attribute}."
    second_model: str | None = None
    prefix: str | None = None
    chat_template: bool = True
    bands: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    parser: str | None = None
    apart: bool = False
    objects: str = "lost"
    segmenter: Any = None

    @property
    def answer_tokens(self) -> int:
        """The largest number of tokens in an answer: `max_new_tokens`, or 64."""
        return 64 if self.max_new_tokens is None else self.max_new_tokens


class Evaluation(ABC):
    """An evaluation that reproduces one figure of a paper. Subclass it, and register it with `@evaluation`.

    Attributes:
        name: The name, as in `mllm-fast eval NAME`.
        title: The title of the report.
        needs_masks: Whether the evaluation must know where the objects of its images are.
        of_videos: Whether the evaluation reads videos with events, in place of images.
        benchmark: The benchmark with the questions, "mme" or "pope"; "" for an evaluation of images alone.
        settings: The settings, as plain JSON. Together with the model and the sample they decide the rows.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    needs_masks: ClassVar[bool] = False
    of_videos: ClassVar[bool] = False
    benchmark: ClassVar[str] = ""
    settings: dict[str, Any] = {}  # noqa: RUF012

    @classmethod
    def from_options(cls, options: EvaluationOptions) -> Evaluation:
        """Create the evaluation from the command line's options. By default it is created without arguments."""
        return cls()

    @abstractmethod
    def rows(self, vlm: VLM, sample: Sample) -> list[Row]:
        """Return the rows of one sample.

        The rows do not depend on the samples that came before.

        Returns:
            The rows, as plain JSON without NaN.

        Raises:
            InputError, OSError: The sample cannot be used.
            EndsRunError: No sample can be used.
        """

    @abstractmethod
    def findings(self, rows: dict[str, list[Row]]) -> Report:
        """Return the report on the rows of the samples that could be used. There is at least one."""

    def report(self, rows: dict[str, list[Row]]) -> Report:
        """Return the report on all samples, with the reasons why some could not be used."""
        failed = {name: one[0]["error"] for name, one in rows.items() if is_failed(one)}
        used = {name: one for name, one in rows.items() if name not in failed}
        found = self.findings(used) if used else self.nothing("No sample could be used.")
        return replace(found, failed=failed)

    def nothing(self, why: str) -> Report:
        """Return a report without figures that says why there are none."""
        return Report(self.name, self.title, [why], [], [], {})


def is_failed(rows: Sequence[Row]) -> bool:
    """Return whether the rows are those of a sample that could not be used."""
    return bool(rows) and "error" in rows[0]


def is_open(rows: Sequence[Row]) -> bool:
    """Return whether a judge or a reader gave no answer for at least one of the rows."""
    return any("unjudged" in row or "unanswered" in row for row in rows)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error.

    The standard error is s / sqrt(n), where the standard deviation s divides by n - 1.

    Returns:
        The mean and the standard error. The mean is NaN without values, the error with fewer than two.
    """
    array = np.asarray(values, float)
    if not len(array):
        return float("nan"), float("nan")
    error = array.std(ddof=1) / len(array) ** 0.5 if len(array) > 1 else float("nan")
    return float(array.mean()), float(error)
