"""Measure whether the text changes with what an image seems to show (arXiv 2405.14612, section 4.4).

The vision embedding E is changed so that the detector sees one object in place of another. The effect is compared with
that of control changes of the same norm, which should do nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from ...core.errors import InputError, check_choice
from ...joint.perturb import STEPS, WAYS, at_random, toward
from ...runtime.likelihood import ONE_TO_TEN, expectation, yes_probabilities
from ...shapes.scenes import COLORS as SHAPE_COLORS
from ...shapes.scenes import generate_scene
from ..base import mean_and_error
from ..report import COLORS, Chart, Report, Table, cell
from ..rows import Row
from ..samples import Sample, Samples, Thing, pictures
from .base import JointEvaluation, interval, number_of, percent

if TYPE_CHECKING:
    from ...joint.model import JointModel, Seen
    from ...vlm import VLM

NONE, RANDOM, NEUTRAL = "none", "random", "neutral"
LABELS = {
    "step": "swap, one signed step",
    "pgd": "swap, projected gradient",
    NEUTRAL: "neutral swap",
    RANDOM: "random, of equal norm",
}
DESCRIBE = "Describe the image."
KINDS = ("text", "yes", "score")


class Asked(NamedTuple):
    """A question about an image.

    Attributes:
        name: The name of the question in the report.
        text: The question.
        kind: The kind of answer: "text" for the text itself, "yes" for P(yes), "score" for the expectation of a number.
        instead: The question to ask after the swap, if the question names what is swapped.
    """

    name: str
    text: str
    kind: str = "text"
    instead: str = ""


class Swap(NamedTuple):
    """A swap, given by the detector's text queries that lose score (`lower`) and those that gain it (`higher`)."""

    lower: tuple[str, ...]
    higher: tuple[str, ...]


class Bias(JointEvaluation):
    """An evaluation of how changes of the vision embedding E change the text.

    An image has one row for each change of E and each question. The row has the answer, and the share of the words of
    the description that stayed. The changes are "none", the swap by each of `ways`, random changes of the same norm,
    and the neutral swap, of objects that have nothing to do with the question. Images of a second folder (group
    "second") are swapped the other way round.

    Args:
        joint: The folder of the joint model.
        swap, neutral: The queries that lose and gain in the swap and in the neutral swap.
        questions: The questions for every image. Without them, the colour and the shape of the swapped object of a
            generated scene are asked for.
        size: The norm of a change, in shares of E's norm.
        ways: The ways to make the swap, "step" or "pgd".
        controls: The number of random changes.
        values: The number that each answer to a question of kind "score" counts for.
        max_new_tokens: The largest number of tokens in an answer.
    """

    name: ClassVar[str] = "bias"
    title: ClassVar[str] = "What the text makes of what an image seems to show"

    def __init__(  # noqa: PLR0913
        self,
        joint: str,
        swap: Swap,
        neutral: Swap,
        questions: Sequence[Asked] = (),
        size: float = 0.5,
        ways: Sequence[str] = WAYS,
        controls: int = 3,
        values: Mapping[str, float] = ONE_TO_TEN,
        max_new_tokens: int = 32,
    ):
        for one in (swap, neutral):
            if not one.lower or not one.higher:
                raise InputError("a swap needs at least one text query that loses and one that gains")
        for question in questions:
            check_choice("kind", question.kind, KINDS)
        for way in ways:
            check_choice("way", way, WAYS)
        if controls < 1:
            raise InputError(f"controls is at least 1, got {controls}")
        if not size > 0:
            raise InputError(f"the size of a change is above 0, in shares of the embedding's norm, got {size}")
        self.values = dict(values)
        self.swap, self.neutral, self.questions = swap, neutral, tuple(questions)
        super().__init__(
            joint,
            swap=[list(one) for one in swap],
            neutral=[list(one) for one in neutral],
            questions=[list(one) for one in questions],
            size=size,
            steps=STEPS,
            ways=list(ways),
            controls=controls,
            values=self.values,
            max_new_tokens=max_new_tokens,
        )

    def rows(self, vlm: VLM, sample: Sample) -> list[Row]:
        joint = self.joint(vlm)
        seen = joint.see(sample.image)
        questions = self.questions or swapped_questions(sample, self.swap)
        variants = self._variants(joint, seen, sample)
        said = joint.generate(
            [one for _, one in variants], [DESCRIBE] * len(variants), max_new_tokens=self.settings["max_new_tokens"]
        )
        found = []
        for asked in questions:
            texts = [asked.instead if asked.instead and name in WAYS else asked.text for name, _ in variants]
            answers = self._answers(joint, [one for _, one in variants], texts, asked.kind)
            for (name, _), answer, described in zip(variants, answers, said, strict=True):
                found.append(
                    {
                        "change": name,
                        "group": sample.group,
                        "question": asked.name,
                        "kind": asked.kind,
                        "answer": answer,
                        "kept": words_kept(said[0].text, described.text),
                    }
                )
        return found

    def _variants(self, joint: JointModel, seen: Seen, sample: Sample) -> list[tuple[str, Seen]]:
        embed = lambda texts: joint.owl.embed_queries(texts).clone()  # noqa: E731
        size, vision = self.settings["size"], seen.vision
        lower, higher = (embed(one) for one in self.swap)
        if sample.group == "second":
            lower, higher = higher, lower
        changed = [(way, toward(joint.owl, vision, lower, higher, size, way)) for way in self.settings["ways"]]
        seeds = [number_of(sample.name) + i for i in range(self.settings["controls"])]
        changed += [(RANDOM, at_random(vision, size, seed)) for seed in seeds]
        lower, higher = (embed(one) for one in self.neutral)
        changed.append((NEUTRAL, toward(joint.owl, vision, lower, higher, size, self.settings["ways"][-1])))
        return [(NONE, seen), *((name, seen.with_tokens(tokens)) for name, tokens in changed)]

    def _answers(self, joint: JointModel, seen: list[Seen], texts: list[str], kind: str) -> list[Any]:
        if kind == "text":
            said = joint.generate(seen, texts, max_new_tokens=self.settings["max_new_tokens"])
            return [answer.text for answer in said]
        if kind == "yes":
            with joint.reading(seen):
                return yes_probabilities(joint.vlm, [[one.vision.picture] for one in seen], texts).tolist()
        found = []
        for one, text in zip(seen, texts, strict=True):
            with joint.reading([one]):
                found.append(expectation(joint.vlm, [one.vision.picture], text, self.values))
        return found

    def findings(self, rows: dict[str, list[Row]]) -> Report:
        every = effects(rows)
        changes = [*self.settings["ways"], NEUTRAL, RANDOM]
        figures: dict[str, Any] = {"pictures": len(rows), "size": self.settings["size"], "effects": {}}
        says, tables, lines = [], [], []
        for question in dict.fromkeys(row["question"] for row in every):
            part = [row for row in every if row["question"] == question]
            kind = part[0]["kind"]
            cells = []
            for change in changes:
                mine = [row for row in part if row["change"] == change]
                moved, count = [row["moved"] for row in mine], len({row["picture"] for row in mine})
                mean, error = mean_and_error(picture_means(mine))
                figures["effects"].setdefault(question, {})[change] = {"mean": mean, "error": error, "pictures": count}
                shown = percent(mean, count) if kind == "text" else cell((mean, 1.96 * error), 3)
                cells.append([LABELS[change], shown, str(len(moved))])
                if kind == "text":
                    lines.append((f"{question}: {LABELS[change]}", mean, interval(mean, count)))
            what = "answers that changed, % (95 % interval)" if kind == "text" else "change, mean ± 95 % interval"
            tables.append(Table(f"{question}: {what}", ["change of E", "effect", "answers"], cells))
        became = [row for row in every if row["question"] == "color" and row["change"] in WAYS]
        if became:
            colors = swapped_colors(self.swap)
            figures["became"] = {
                way: float(np.mean([row["answer"] == colors[1] for row in became if row["change"] == way]))
                for way in self.settings["ways"]
            }
            shares = ", ".join(f"{share:.1%} ({LABELS[way]})" for way, share in figures["became"].items())
            says.append(f"The colour that is said becomes {colors[1]} in {shares}.")
        kept = {change: mean_and_error([row["kept"] for row in every if row["change"] == change]) for change in changes}
        figures["kept"] = {change: mean for change, (mean, _) in kept.items()}
        tables.append(
            Table(
                "How much else changed: words of the description that stayed, % ± standard error",
                ["change of E", "words kept"],
                [[LABELS[change], cell(value, 1, 100)] for change, value in kept.items()],
            )
        )
        says.insert(
            0,
            f"{len(rows)} images; every change has {self.settings['size']:.0%} of the embedding's norm. Swapped:"
            f" {', '.join(self.swap.lower)} for {', '.join(self.swap.higher)}; neutral: {', '.join(self.neutral.lower)}"
            f" for {', '.join(self.neutral.higher)}.",
        )
        if any(row["question"] == "shape" for row in every):
            says.append("After a swap the shape is asked of the object of the new colour, else of the old one.")
        charts = []
        if lines:
            charts.append(
                Chart(
                    "flips",
                    lambda figure: _draw(figure, lines),
                    "How often each answer changed, by what was changed; bars: 95 % intervals.",
                    (8.0, 1.2 + 0.35 * len(lines)),
                )
            )
        return Report(self.name, self.title, says, tables, charts, figures)


def effects(rows: dict[str, list[Row]]) -> list[Row]:
    """Return all rows except those of the change "none", with the fields "picture" and "moved" added.

    "picture" is the name of the image. "moved" is the change of the answer: 0 or 1 for a text, and the difference for a
    number. The difference has the opposite sign for images that are swapped the other way round (group "second").
    """
    found = []
    for picture, one in rows.items():
        before = {row["question"]: row["answer"] for row in one if row["change"] == NONE}
        for row in one:
            if row["change"] == NONE:
                continue
            was = before[row["question"]]
            if row["kind"] == "text":
                moved = float(row["answer"] != was)
            else:
                moved = (row["answer"] - was) * (-1 if row["group"] == "second" else 1)
            found.append({**row, "picture": picture, "moved": moved})
    return found


def picture_means(rows: Sequence[Row]) -> list[float]:
    """Return the mean effect in each image. Several random changes of one image do not count as several images."""
    by: dict[str, list[float]] = {}
    for row in rows:
        by.setdefault(row["picture"], []).append(row["moved"])
    return [float(np.mean(values)) for values in by.values()]


def words_kept(before: str, after: str) -> float:
    """Return the F1 of the words that two texts share. Each word counts as often as it is there."""
    left, right = Counter(before.lower().split()), Counter(after.lower().split())
    both, total = sum((left & right).values()), sum(left.values()) + sum(right.values())
    return 2 * both / total if total else 1.0


def swapped_questions(sample: Sample, swap: Swap) -> list[Asked]:
    """Return the questions for the colour and the shape of a generated scene's only object of the swapped colour.

    Raises:
        InputError: The sample is not a generated scene with exactly one such object.
    """
    colors = swapped_colors(swap)
    if sample.scene is None:
        raise InputError("no question was given: --question 'Is this person a doctor?' --kind yes")
    things = [one for one in sample.scene.objects if one.color == colors[0]]
    if None in colors or len(things) != 1:
        raise InputError(f"{sample.name}: the scene has {len(things)} {colors[0]} objects, one is needed")
    shape = "what shape is the {} object?"
    return [
        Asked("color", f"what color is the {things[0].shape}?"),
        Asked("shape", shape.format(colors[0]), "text", shape.format(colors[1])),
    ]


def swapped_colors(swap: Swap) -> list[str | None]:
    """Return the two colours of the generated scenes that are swapped, None where the first query names none."""
    return [next((color for color in SHAPE_COLORS if color in query.split()), None) for query, *_ in swap]


def swap_scenes(count: int, seed: int, lower: str, higher: str) -> Samples:
    """Return generated scenes with one object of the colour `lower` and none of the colour `higher`.

    The object of the colour `lower` is the only one of its shape.
    """
    for color in (lower, higher):
        check_choice("color", color, tuple(SHAPE_COLORS))
    found: list[Sample] = []
    number = 0
    while len(found) < count:
        scene = generate_scene(np.random.default_rng([seed, number]))
        colors, shapes = [one.color for one in scene.objects], [one.shape for one in scene.objects]
        if colors.count(lower) == 1 and higher not in colors and shapes.count(shapes[colors.index(lower)]) == 1:
            things = tuple(Thing(f"{one.color} {one.shape}", one.mask) for one in scene.objects)
            found.append(Sample(f"scene {number}", scene, things))
        number += 1
    return Samples(found, {"scenes": seed, "one": lower, "none": higher})


def swapped_scenes(count: int, seed: int, one: str, other: str) -> Samples:
    """Return `count` generated scenes of the colour `one`, and as many of the colour `other`, in the group "second"."""
    first, second = swap_scenes(count, seed, one, other), swap_scenes(count, seed + 1, other, one)
    listed = [
        replace(sample, name=f"{group}/{sample.name}", group=group)
        for group, samples in (("first", first), ("second", second))
        for sample in samples.list
    ]
    return Samples(listed, {"first": first.origin, "second": second.origin})


def two_folders(folders: Sequence[Path], count: int | None = None) -> Samples:
    """Return the first `count` images of one folder or of two. Those of the second folder are in the group "second".

    Raises:
        InputError: There are more than two folders, or a folder does not exist or has no images.
    """
    if not 1 <= len(folders) <= 2:
        raise InputError(f"give one folder of images, or two, got {len(folders)}")
    found: list[Sample] = []
    for folder, group in zip(folders, ("first", "second"), strict=False):
        listed = pictures(folder, count).list
        found += [replace(one, name=f"{group}/{one.name}", group=group) for one in listed]
    return Samples(found, {"folders": [str(folder) for folder in folders]})


def _draw(figure: Any, lines: Sequence[tuple[str, float, tuple[float, float]]]) -> None:
    axes = figure.subplots()
    for place, (label, mean, (low, high)) in enumerate(reversed(lines)):
        color = COLORS[1] if label.endswith((LABELS[RANDOM], LABELS[NEUTRAL])) else COLORS[0]
        axes.barh(place, 100 * mean, color=color, height=0.6)
        edges = [[100 * max(0.0, mean - low)], [100 * max(0.0, high - mean)]]
        axes.errorbar([100 * mean], [place], xerr=edges, color="black", capsize=3)
    axes.set_yticks(range(len(lines)), [label for label, _, _ in reversed(lines)])
    axes.set_xlabel("answers that changed (%)")
    axes.set_xlim(0, 103)
    axes.grid(axis="x", alpha=0.25)
