"""Play the pointing game (arXiv 1608.00507) on generated scenes: does a heatmap point at the object of a question?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ...core.errors import InputError
from ...shapes.questions import ask
from ..report import Report, Table
from ..rows import Row
from ..samples import Sample
from .base import JointEvaluation, number_of, percent

if TYPE_CHECKING:
    from ...explain.box_weights import BoxWeights
    from ...vlm import VLM

_TASKS = ("color", "shape")


class Pointing(JointEvaluation):
    """An evaluation of whether the gradient-alignment heatmap points at the object of a question.

    There is one row for each question about one object of a scene. The row says whether the answer is right, and
    whether the heaviest pixel of the answer's heatmap lies in the object's box and on the object itself. All pixels of
    the heaviest box have the same weight, so the middle of the box stands for them. `share` is the share of these
    pixels that lie on the object itself.

    Args:
        joint: The folder of the joint model.
        least: The scores that a box needs to take part. With 0 all boxes take part, as in the paper's heatmap.
    """

    name: ClassVar[str] = "pointing"
    title: ClassVar[str] = "Does gradient alignment point at what was asked about?"

    def __init__(self, joint: str, least: tuple[float, ...] = (0.0, 0.02)):
        super().__init__(joint, least=list(least))

    def rows(self, vlm: VLM, sample: Sample) -> list[Row]:
        if sample.scene is None:
            raise InputError(f"{sample.name}: is no generated scene, which questions about one object need")
        joint, found = self.joint(vlm), []
        seen = joint.see(sample.image)
        rng = np.random.default_rng(number_of(sample.name))
        for task in _TASKS:
            question = ask(sample.scene, rng, task)
            if question is None or question.target is None:
                continue
            ex = joint.explain(seen, question.text)
            one = sample.scene.objects[question.target]
            row: Row = {"task": task, "question": question.text, "said": ex.text, "right": ex.text == question.answer}
            weights = ex.box_weights(0)
            row["query"] = weights.query
            for least in self.settings["least"]:
                row[f"at {least:g}"] = pointed(weights, one.box, one.mask, least)
            found.append(row)
        return found

    def findings(self, rows: dict[str, list[Row]]) -> Report:
        every = [row for one in rows.values() for row in one]
        right = [row for row in every if row["right"]]
        if not right:
            return self.nothing("No question was answered rightly.")
        figures: dict[str, Any] = {"questions": len(every), "right": len(right), "least": {}}
        lines = []
        for least in self.settings["least"]:
            which = "all boxes" if not least else f"boxes of a score of {least:g} or more"
            figures["least"][f"{least:g}"] = {}
            for task in (*_TASKS, "both"):
                part = [row[f"at {least:g}"] for row in right if task in (row["task"], "both")]
                if not part:
                    continue
                means = {key: float(np.mean([one[key] for one in part])) for key in ("box", "object", "share")}
                figures["least"][f"{least:g}"][task] = means | {"count": len(part)}
                shown = [percent(means["box"], len(part)), percent(means["object"], len(part))]
                lines.append([which, task, *shown, f"{100 * means['share']:.1f}"])
        first = figures["least"][f"{self.settings['least'][0]:g}"]["both"]
        says = [
            f"{len(right)} of {len(every)} questions are answered rightly. The middle of the heaviest box lies in the"
            f" asked object's box in {first['box']:.1%}, on the object itself (not in a ring's hole) in"
            f" {first['object']:.1%}."
        ]
        table = Table(
            "Heaviest pixel, % of rightly answered questions (95 % interval)",
            ["boxes that take part", "question", "in the object's box", "on the object", "heaviest pixels on it, %"],
            lines,
        )
        return Report(self.name, self.title, says, [table], [], figures)


def pointed(
    weights: BoxWeights, box: tuple[int, int, int, int], mask: np.ndarray, least: float = 0.0
) -> dict[str, float]:
    """Return where the heaviest box points. Only boxes with a score of `least` or more take part.

    Args:
        weights: The weights, scores and boxes.
        box: The object's box: left, top, right, bottom in pixels.
        mask: The object's mask, bool [height, width].
        least: The score that a box needs to take part.

    Returns:
        "box", 1 if the middle of the heaviest box lies in the object's box, else 0; "object", 1 if it lies on the mask,
        else 0; "share", the share of the heaviest box's pixels that lie on the mask. All are 0 if no box takes part.
    """
    kept = np.where(weights.scores.numpy() >= least, weights.weights.numpy(), -1.0)
    if kept.max() < 0:
        return {"box": 0.0, "object": 0.0, "share": 0.0}
    height, width = mask.shape
    left, top, right, bottom = weights.boxes[int(kept.argmax())].double().numpy().clip(0, [width, height] * 2)
    x, y = (left + right) / 2, (top + bottom) / 2
    column, row = min(int(x), width - 1), min(int(y), height - 1)
    inside = mask[round(top) : max(round(bottom), round(top) + 1), round(left) : max(round(right), round(left) + 1)]
    return {
        "box": float(box[0] <= x < box[2] and box[1] <= y < box[3]),
        "object": float(mask[row, column]),
        "share": float(inside.mean()) if inside.size else 0.0,
    }
