"""What the evaluations of descriptions share: whose objects are compared, by whom, and the means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ...core.errors import InputError, check_choice
from ..base import Evaluation, EvaluationOptions, mean_and_error
from ..judges.endpoint import cost
from ..judges.judge import Judge, Unjudged, scores, shapes_judge
from ..rows import Row
from ..samples import Sample

REFERENCES = ("answer", "truth")
FIGURES = ("f1", "precision", "recall")


class DescriptionEvaluation(Evaluation):
    """The base class of evaluations that compare the objects of descriptions.

    Args:
        prompt: The prompt for the description.
        reference: What a description is compared with. "answer" is the model's own description of the whole image, as
            in the paper. "truth" is the known objects of the image.
        judge: The judge of the objects. By default it is that of the generated scenes.
        max_new_tokens: The largest number of tokens in a description.
        price: The price of a million of the judge's tokens, in dollars.
    """

    def __init__(
        self,
        prompt: str = "Describe the image.",
        reference: str = "answer",
        judge: Judge | None = None,
        max_new_tokens: int = 64,
        price: float | None = None,
    ):
        check_choice("reference", reference, REFERENCES)
        self.judge = judge or shapes_judge()
        self.price = price  # in dollars per million of the judge's tokens; changes no row
        self.settings: dict[str, Any] = {
            "prompt": prompt,
            "reference": reference,
            "judge": self.judge.settings,
            "max_new_tokens": max_new_tokens,
        }

    @staticmethod
    def common(options: EvaluationOptions) -> dict[str, Any]:
        """Return what all evaluations of descriptions take from the command line's options."""
        return {
            "prompt": options.prompt,
            "reference": options.reference,
            "judge": options.judge,
            "max_new_tokens": options.answer_tokens,
            "price": options.price,
        }

    @property
    def compared(self) -> str:
        """What descriptions are compared with, for a sentence."""
        return "its own description of the whole image" if self.settings["reference"] == "answer" else "the truth"

    def reference(self, sample: Sample, answer: str) -> str:
        """Return what the descriptions of a sample are compared with.

        Args:
            sample: The sample.
            answer: The model's own description of it.

        Raises:
            InputError: The truth is asked for, and nothing is known of the image's objects.
        """
        if self.settings["reference"] == "answer":
            return answer
        if sample.things is None:
            raise InputError(f"{sample.name}: nothing is known of its objects; use reference 'answer'")
        return ", ".join(f"a {thing.name}" for thing in sample.things)

    def judged(self, reference: str, said: str) -> Row:
        """Return the judge's counts of one description, or why there are none."""
        try:
            found = self.judge.compare(reference, said)
        except Unjudged as error:
            return {"unjudged": str(error), "tokens": error.tokens}
        return {**found.counts, "labels": found.labels, "tokens": found.tokens}

    def asides(self, rows: Iterable[Row]) -> tuple[list[str], dict[str, int]]:
        """Return sentences and figures about descriptions without a judgement, and about the judge's cost."""
        every = list(rows)
        unjudged = [row["unjudged"] for row in every if "unjudged" in row]
        says = []
        if unjudged:
            says.append(f"{len(unjudged)} of {len(every)} descriptions are unjudged and left out: {unjudged[0]}.")
        tokens = sum(row["tokens"] for row in every)
        if tokens:
            says.append(f"The judge's answers took {cost(tokens, self.price)}.")
        return says, {"unjudged": len(unjudged), "judge_tokens": tokens}


def means_of(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Return the mean over images of each figure, and its standard error.

    Images where the figure is not defined and images that are unjudged are left out.
    """
    each = [scores(row["tp"], row["fp"], row["fn"]) for row in rows if "unjudged" not in row]
    return {name: mean_and_error([v for one in each if (v := one[name]) is not None]) for name in FIGURES}


def cell_of(value: tuple[float, float]) -> str:
    """Return a mean and its standard error as a table shows them."""
    return "-" if np.isnan(value[0]) else f"{value[0]:.3f} ± {value[1]:.3f}"


def finite(means: dict[str, tuple[float, float]]) -> dict[str, list[float | None]]:
    """Return means and errors with None in place of NaN, which JSON does not have."""
    return {name: [None if np.isnan(number) else number for number in value] for name, value in means.items()}
