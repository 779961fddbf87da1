"""Compare the boxes from the language model's own vision embedding with the detector's own (arXiv 2405.14612, S 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ...core.errors import InputError
from ...joint.precision import Found, judge_boxes
from ...joint.reverse import ReverseJoint
from ..base import Evaluation, mean_and_error
from ..report import COLORS, Chart, Report, Table, cell
from ..rows import Row
from ..samples import Sample
from .base import weights_digest
from .quality import box_of

if TYPE_CHECKING:
    from ...vlm import VLM

EYES = {"own": "the detector's own embedding", "mapped": "the language model's, through U"}
_PRECISION = 0.9


class ReverseQuality(Evaluation):
    """An evaluation of the boxes from U of the language model's embedding, beside the detector's own.

    An image has one row: the judged boxes of both ("own" and "mapped"), the number of its things, and the distance of U
    from the detector's embedding (1: as far as the mean over the image's tokens).

    Args:
        joint: The folder of U.
        classes: The names of the objects that the detector looks for.
    """

    name: ClassVar[str] = "reverse"
    title: ClassVar[str] = "What is lost in the opposite direction?"

    def __init__(self, joint: str, classes: Sequence[str]):
        if not classes:
            raise InputError("the boxes are compared on known objects: give --masks")
        self.name_of_joint = joint
        self.settings = {"joint": joint, "weights": weights_digest(joint), "classes": list(classes)}
        self._made: tuple[VLM, ReverseJoint] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_made": None}  # each process loads its own

    def rows(self, vlm: VLM, sample: Sample) -> list[Row]:
        if sample.things is None:
            raise InputError(f"{sample.name}: nothing is known of its objects")
        if self._made is None or self._made[0] is not vlm:
            self._made = vlm, ReverseJoint.from_pretrained(self.name_of_joint, vlm=vlm)
        reverse, classes = self._made[1], self.settings["classes"]
        queries = [f"a photo of a {name}" for name in classes]
        there = [(classes.index(one.name), box_of(one.mask)) for one in sample.things if one.name in classes]
        own, mapped = reverse.see(sample.image)
        row: Row = {"things": len(there)}
        for eyes, vision in zip(EYES, (own, mapped), strict=True):
            found = reverse.owl.boxes(vision, queries)
            row[eyes] = judge_boxes(found.logits, found.boxes, there)
        with torch.inference_mode():
            error = (mapped.tokens - own.tokens).square().sum()
            spread = (own.tokens - own.tokens.mean(0)).square().sum()
        return [row | {"distance": float((error / spread).sqrt())}]

    def findings(self, rows: dict[str, list[Row]]) -> Report:
        every = [row for one in rows.values() for row in one]
        things = sum(row["things"] for row in every)
        if not things:
            return self.nothing("No image shows an object of the classes.")
        found = {eyes: Found.of([row[eyes] for row in every], things) for eyes in EYES}
        recall = {eyes: one.recall_at(_PRECISION)[0] for eyes, one in found.items()}
        precise = {eyes: one.average_precision() for eyes, one in found.items()}
        distance = mean_and_error([row["distance"] for row in every])
        says = [
            f"{things} things in {len(rows)} images. From the language model's own embedding through U, the detector's"
            f" heads find {recall['mapped']:.1%} of them at a precision of {_PRECISION:.0%}, from its own"
            f" {recall['own']:.1%}; average precision {precise['mapped']:.3f} and {precise['own']:.3f}. The language"
            " model's text is unchanged.",
            "The authors of the paper report that they found no layer of this direction that works.",
        ]
        table = Table(
            "The detector's boxes",
            ["embedding", f"recall at a precision of {_PRECISION:.0%}, %", "average precision"],
            [[label, f"{100 * recall[eyes]:.1f}", f"{precise[eyes]:.3f}"] for eyes, label in EYES.items()],
            f"U is {cell(distance, 3)} away from the detector's embedding (1: as far as its mean).",
        )
        chart = Chart(
            "reverse",
            lambda figure: _draw(figure, found),
            "Precision over recall of the detector's boxes, at all thresholds.",
            (6.5, 4.0),
        )
        figures = {"pictures": len(rows), "things": things, "recall": recall, "average_precision": precise}
        return Report(self.name, self.title, says, [table], [chart], figures | {"distance": distance[0]})


def _draw(figure: Any, found: dict[str, Found]) -> None:
    axes = figure.subplots()
    for (eyes, one), color, style in zip(found.items(), COLORS, ("-", "--"), strict=False):
        _, precisions, recalls = one.curve()
        axes.plot(100 * recalls, 100 * precisions, color=color, linestyle=style, label=EYES[eyes])
    axes.set_xlabel("recall (% of things)")
    axes.set_ylabel("precision (% of boxes)")
    axes.set_xlim(0, 103)
    axes.set_ylim(0, 103)
    axes.grid(alpha=0.25)
    axes.legend(loc="lower left")
