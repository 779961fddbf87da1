"""Compare a language model's yes with a detector's best box: is an object there? (arXiv 2405.14612, section 4.2.)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ...core.corruptions import KINDS, degrade
from ...core.errors import InputError
from ...core.images import load_image
from ...joint.presence import EYES, QUERY, best_boxes, check_names, said_yes
from ...shapes.scenes import COLORS as SHAPE_COLORS
from ..report import COLORS, Chart, Report, Table
from ..roc import auroc, split_threshold
from ..rows import Row
from ..samples import Sample
from .base import JointEvaluation, number_of, percent

if TYPE_CHECKING:
    from ...vlm import VLM

_COLOR_WORDS = {*SHAPE_COLORS, "black", "white", "gray", "grey", "brown", "silver", "golden"}
ERRS = 0.1  # images count as hard if the model calls this share or more of the absent classes present


class Hallucination(JointEvaluation):
    """An evaluation of how well a detector finds hallucinated objects, on images that are degraded.

    An image has one row for each class and each way to degrade the image. The row says whether the class is there. It
    has the model's P(yes) from its own vision encoder ("own") and through the joint model ("joint"), and the detector's
    largest score.

    Args:
        joint: The folder of the joint model.
        classes: The classes to ask for. An image has a class if the name of one of its objects has all words of the
            class.
        strengths: How far images are degraded, from 0 (not at all) to 1.
        kinds: The kinds of degradation.
    """

    name: ClassVar[str] = "hallucination"
    title: ClassVar[str] = "Is it there, or only said?"

    def __init__(
        self,
        joint: str,
        classes: Sequence[str],
        strengths: Sequence[float] = (0.0,),
        kinds: Sequence[str] = KINDS,
    ):
        check_names(classes)
        for strength in strengths:
            if not 0 <= strength <= 1:
                raise InputError(f"a strength is 0 to 1, got {strength}")
        super().__init__(joint, classes=list(classes), strengths=sorted(set(strengths)), kinds=list(kinds))

    def rows(self, vlm: VLM, sample: Sample) -> list[Row]:
        if sample.things is None:
            raise InputError(f"{sample.name}: nothing is known of what is there; give masks")
        joint, picture = self.joint(vlm), load_image(sample.image)
        classes: list[str] = self.settings["classes"]
        truth = {name: any(is_a(thing.name, name) for thing in sample.things) for name in classes}
        found: list[Row] = []
        for strength in self.settings["strengths"]:
            for kind in self.settings["kinds"] if strength else ["none"]:
                rng = np.random.default_rng([number_of(sample.name), int(1000 * strength)])
                shown = picture if kind == "none" else degrade(picture, kind, strength, rng)
                seen = joint.see(shown)
                yes = {eyes: said_yes(joint, seen, classes, eyes) for eyes in EYES}
                best = best_boxes(joint, seen, [QUERY.format(name) for name in classes])
                found += [
                    {
                        "kind": kind,
                        "strength": strength,
                        "class": name,
                        "truth": truth[name],
                        **{eyes: yes[eyes][i] for eyes in EYES},
                        "score": best[i].score,
                        "first": number_of(sample.name) % 2 == 0,
                    }
                    for i, name in enumerate(classes)
                ]
        return found

    def findings(self, rows: dict[str, list[Row]]) -> Report:
        every = [row for one in rows.values() for row in one]
        ways = list(dict.fromkeys((row["kind"], row["strength"]) for row in every))
        ways.sort(key=lambda way: (way[1] > 0, *way))  # images that are not degraded come first
        by = {way: [row for row in every if (row["kind"], row["strength"]) == way] for way in ways}
        measured = {way: measure(part) for way, part in by.items()}
        hard = {}
        for kind in dict.fromkeys(kind for kind, _ in ways):
            enough = [strength for k, strength in sorted(ways) if k == kind and measured[k, strength]["errs"] >= ERRS]
            if enough:
                hard[kind] = enough[0]
        chosen = [row for kind, strength in hard.items() for row in by[kind, strength]] or every
        total = measure(chosen)
        figures = {
            "pictures": len(rows),
            "hard": {kind: {"strength": strength, **measured[kind, strength]} for kind, strength in hard.items()},
            "together": total,
            "all": [{"kind": kind, "strength": strength, **measured[kind, strength]} for kind, strength in by],
        }
        which = ", ".join(f"{kind} {strength:g}" for kind, strength in hard.items())
        where = (
            f"Where the model says yes to {ERRS:.0%} or more of what is not there ({which})"
            if hard
            else f"The model never says yes to {ERRS:.0%} of what is not there; over all images"
        )
        says = [
            f"{where}, the detector's largest score tells what is there with an AUROC of {total['score']:.3f}; the"
            f" model's own P(yes) has {total['own']:.3f}, through the joint model's eyes {total['joint']:.3f}."
        ]
        if total["threshold"] is not None:
            says.append(
                f"A threshold of {total['threshold']:.2f}, chosen on one half of the images, keeps on the other half"
                f" {total['true_kept']:.1%} of what is there and flags {total['false_flagged']:.1%} of what is not; of"
                f" the model's false yeses {total['false_yes_flagged']:.1%}."
            )
        columns = ["pictures", "false yes", "AUROC: box score", "P(yes), own eyes", "P(yes), joint"]
        table = Table(
            "By how images were made worse; false yes: of what is not there, % (95 % interval)",
            columns,
            [
                [
                    f"{kind} {strength:g}" if strength else "as they are",
                    percent(one["errs"], one["absent"]),
                    *(f"{one[name]:.3f}" for name in ("score", "own", "joint")),
                ]
                for (kind, strength), one in measured.items()
            ],
        )
        chart = Chart(
            "scores",
            lambda figure: _draw(figure, chosen, total["threshold"]),
            "The detector's largest score and the model's P(yes), of what is there and of what is not"
            + (f", on images made worse ({which})." if hard else "."),
            (9.0, 3.6),
        )
        return Report(self.name, self.title, says, [table], [chart], figures)


def is_a(thing: str, kind: str) -> bool:
    """Return whether an object's name is that of a class, alone or with colours before it.

    A "red circle" is a "circle". A "teddy bear" is no "bear".
    """
    words, own = thing.lower().split(), kind.lower().split()
    before, last = words[: len(words) - len(own)], words[len(words) - len(own) :]
    return last == own and all(word in _COLOR_WORDS for word in before)


def measure(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the figures of some rows.

    Returns:
        "absent" and "present", the numbers of absent and present classes; "errs", the share of the absent classes that
        the model calls present with its own vision encoder; "score", "own" and "joint", the AUROC against the truth of
        the detector's score and of both P(yes); "threshold", see `split_threshold`. With a threshold, also "true_kept"
        and "false_flagged", see `Tested`, and "false_yes_flagged", the share of the model's false yeses that the
        threshold flags in the second split.
    """
    truth = [row["truth"] for row in rows]
    absent = [row for row in rows if not row["truth"]]
    found: dict[str, Any] = {
        "errs": float(np.mean([row["own"] >= 0.5 for row in absent])) if absent else 0.0,
        "absent": len(absent),
        "present": len(rows) - len(absent),
    }
    found |= {name: auroc([row[name] for row in rows], truth) for name in ("score", "own", "joint")}
    tested = split_threshold([row["score"] for row in rows], truth, [row["first"] for row in rows])
    found["threshold"] = None if tested is None else tested.threshold
    if tested is not None:
        wrong = [row for row in absent if row["own"] >= 0.5 and not row["first"]]
        flagged = float(np.mean([row["score"] < tested.threshold for row in wrong])) if wrong else float("nan")
        found |= {"true_kept": tested.true_kept, "false_flagged": tested.false_flagged, "false_yes_flagged": flagged}
    return found


def _draw(figure: Any, rows: Sequence[Row], threshold: float | None) -> None:
    axes = figure.subplots(1, 2, sharey=True)
    bins = np.linspace(0, 1, 21)
    for place, (name, label) in zip(
        axes, (("score", "detector's largest score"), ("own", "model's P(yes)")), strict=True
    ):
        for truth, color, style, what in ((True, COLORS[1], "-", "there"), (False, COLORS[0], "--", "not there")):
            values = [row[name] for row in rows if row["truth"] == truth]
            counts, _ = np.histogram(values, bins)
            place.stairs(
                100 * counts / max(1, len(values)), bins, color=color, linestyle=style, label=what, linewidth=1.6
            )
        place.set_xlabel(f"{label} (0 to 1)")
        place.grid(alpha=0.25)
    if threshold is not None:
        axes[0].axvline(threshold, color="#777777", linestyle=":", label="threshold")
    axes[0].set_ylabel("share of classes (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
