"""Compare the boxes of what a model says is there with those of what it says is not (arXiv 2405.14612, section 4.2).

The paper's protocol: a joint model is asked about every class of a dataset in every image, and the detector's largest
score for the class is averaged over the yeses and over the noes, apart for absent and present classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ...core.errors import InputError
from ...joint.presence import best_boxes, check_names
from ..base import mean_and_error
from ..report import COLORS, Chart, Report, Table, cell
from ..roc import auroc
from ..rows import Row
from ..samples import Sample
from .base import JointEvaluation
from .hallucination import is_a

if TYPE_CHECKING:
    from ...vlm import VLM

ANSWERS = ("yes", "no", "other")
_BATCH = 16  # questions at a time: all classes of a dataset at once would need too much memory
_GALLERY = 25
_PRESENCE = {False: "not there", True: "there"}


class AnswersAndBoxes(JointEvaluation):
    """An evaluation of the detector's largest score by the language model's yes or no, both from one embedding.

    An image has one row for each class: whether it is there ("truth"), what the model answered ("said": "yes", "no", or
    "other" for any other text), and the largest score of the detector, of any box and without a threshold, with its
    box.

    Args:
        joint: The folder of the joint model.
        classes: The classes to ask for. An image has a class if one of its objects has this name, alone or with colours
            before it.
        question: The question, with {} for the class.
        query: The detector's text query, with {} for the class.
        max_new_tokens: The largest number of tokens in an answer.

    Raises:
        InputError: There is no class, or the question or the query has no place for it.
    """

    name: ClassVar[str] = "answers-and-boxes"
    title: ClassVar[str] = "The boxes behind yes and no"

    def __init__(self, joint: str, classes: Sequence[str], question: str, query: str = "{}", max_new_tokens: int = 4):
        check_names(classes)
        for what, text in (("question", question), ("query", query)):
            if text.count("{}") != 1:
                raise InputError(f"the {what} has one {{}} for the class, got {text!r}")
        super().__init__(joint, classes=list(classes), question=question, query=query, max_new_tokens=max_new_tokens)

    def rows(self, vlm: VLM, sample: Sample) -> list[Row]:
        if sample.things is None:
            raise InputError(f"{sample.name}: nothing is known of what is there; give masks")
        joint, classes = self.joint(vlm), self.settings["classes"]
        seen = joint.see(sample.image)
        texts: list[str] = []
        for start in range(0, len(classes), _BATCH):
            asked = [self.settings["question"].format(name) for name in classes[start : start + _BATCH]]
            said = joint.generate([seen] * len(asked), asked, max_new_tokens=self.settings["max_new_tokens"])
            texts += [answer.text for answer in said]
        best = best_boxes(joint, seen, [self.settings["query"].format(name) for name in classes])
        return [
            {
                "class": name,
                "truth": any(is_a(thing.name, name) for thing in sample.things),
                "said": meaning(text),
                "score": box.score,
                "box": [round(side, 2) for side in box.box],
            }
            for name, text, box in zip(classes, texts, best, strict=True)
        ]

    def findings(self, rows: dict[str, list[Row]]) -> Report:
        every = [row | {"picture": name} for name, one in rows.items() for row in one]
        found = table_of(every)
        absent = [row for row in every if not row["truth"] and row["said"] != "other"]
        area = auroc([row["score"] for row in absent], [row["said"] == "yes" for row in absent])
        others = sum(row["said"] == "other" for row in every)
        mean = lambda truth, said: cell(found[truth, said]["score"], 3)  # noqa: E731
        says = [
            f"{len(every)} questions about {len(rows)} images. Of what is not there, the detector's largest score is"
            f" {mean(False, 'yes')} on average where the model says yes, and {mean(False, 'no')} where it says no; of"
            f" what is there, {mean(True, 'yes')} and {mean(True, 'no')}. The score tells the yeses from the noes about"
            f" absent things with an AUROC of {area:.3f}."
        ]
        if others:
            says.append(f"{others} answers are neither yes nor no, and are left out.")
        table = Table(
            "The detector's largest score, mean ± standard error over questions, and their number",
            ["the class is", "the model says yes", "questions", "the model says no", "questions "],
            [
                [
                    _PRESENCE[truth],
                    *(text for said in ("yes", "no") for text in (mean(truth, said), str(found[truth, said]["count"]))),
                ]
                for truth in _PRESENCE
            ],
        )
        wrong = [row for row in every if not row["truth"] and row["said"] == "yes"]
        worst = sorted(wrong, key=_score, reverse=True)[:_GALLERY]
        gallery = Table(
            f"The {len(worst)} hallucinations with the largest score",
            ["image", "class", "score", "box, pixels"],
            [
                [row["picture"], row["class"], f"{row['score']:.3f}", ", ".join(f"{side:.0f}" for side in row["box"])]
                for row in worst
            ],
        )
        figures = {
            "pictures": len(rows),
            "other": others,
            "auroc of yes, absent": area,
            "scores": {
                f"{_PRESENCE[truth]}, {said}": {"mean": one["score"][0], "count": one["count"]}
                for (truth, said), one in found.items()
            },
        }
        chart = Chart(
            "answers-and-boxes",
            lambda figure: _draw(figure, every),
            "How many questions had which largest score of the detector, by the model's answer; left of classes that"
            " are not there, right of those that are.",
            (9.0, 3.6),
        )
        return Report(self.name, self.title, says, [table, *([gallery] if worst else [])], [chart], figures)


def meaning(text: str) -> str:
    """Return what an answer says, "yes", "no" or "other". It must be the word alone, but for case and a full stop."""
    said = text.strip().rstrip(".").lower()
    return said if said in ("yes", "no") else "other"


def table_of(rows: Sequence[Row]) -> dict[tuple[bool, str], dict[str, Any]]:
    """Return the mean of the scores, with its standard error, and their count, by truth and answer."""
    found = {}
    for truth in _PRESENCE:
        for said in ("yes", "no"):
            scores = [row["score"] for row in rows if row["truth"] == truth and row["said"] == said]
            found[truth, said] = {"score": mean_and_error(scores), "count": len(scores)}
    return found


def _score(row: Row) -> float:
    return row["score"]


def _draw(figure: Any, rows: Sequence[Row]) -> None:
    panels = figure.subplots(1, 2)
    bins = np.linspace(0, 1, 11)
    for axes, truth in zip(panels, _PRESENCE, strict=True):
        mine = [row for row in rows if row["truth"] == truth]
        scores = [[row["score"] for row in mine if row["said"] == said] for said in ("no", "yes")]
        axes.hist(scores, bins, stacked=True, color=[COLORS[1], COLORS[0]], label=["no", "yes"])
        axes.set_title(f"the class is {_PRESENCE[truth]}", fontsize=10)
        axes.set_xlabel("detector's largest score")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("questions")
    figure.legend(*panels[0].get_legend_handles_labels(), title="the model says", loc="outside right upper")
