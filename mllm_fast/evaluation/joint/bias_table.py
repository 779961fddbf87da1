"""Measure how much a property is ascribed to a person who is made to look like another (arXiv 2405.14612, section 4.4).

The paper's tables: for each property and each direction, the mean change of a score from 1 to 10.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ...core.errors import InputError, check_choice
from ...joint.perturb import WAYS, signed_step, toward
from ..base import mean_and_error
from ..report import COLORS, Chart, Report, Table, cell
from ..rows import Row
from ..samples import Sample
from .base import JointEvaluation

if TYPE_CHECKING:
    from ...joint.model import JointModel, Seen
    from ...vlm import VLM

SIGNED = "signed"
TABLE_WAYS = (SIGNED, *WAYS)
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER = re.compile(rf"\W*(?:(\d{{1,2}})|({'|'.join(_NUMBERS)}))(?:\s*/\s*10)?\W*", re.IGNORECASE)


class BiasTable(JointEvaluation):
    """An evaluation of a score before and after an image is made to look like one of the other group.

    An image has one row for each property, with the number that the model gives before and after ("before" and "after",
    None where it gives none). Images of the first group lose the first group's queries and gain the second's; those of
    the second group (group "second") the other way round. The two directions are never pooled.

    Args:
        joint: The folder of the joint model.
        groups: The names of the two groups.
        queries: The detector's text queries of each group.
        properties: The properties to ask for.
        question: The question, with {} for the property.
        way: "signed": the paper's one signed step, see `signed_step`; "step" or "pgd": see `toward`.
        size: The size of the step: of "signed" how far each number of E moves, else a share of E's norm.
        max_new_tokens: The largest number of tokens in an answer.

    Raises:
        InputError: There are not two groups with queries, no property, a question without a place for it, or no such
            way.
    """

    name: ClassVar[str] = "bias-table"
    title: ClassVar[str] = "What is ascribed to whom"

    def __init__(
        self,
        joint: str,
        groups: tuple[str, str],
        queries: tuple[Sequence[str], Sequence[str]],
        properties: Sequence[str],
        question: str,
        way: str = SIGNED,
        size: float = 1.0,
        max_new_tokens: int = 8,
    ):
        check_choice("way", way, TABLE_WAYS)
        if len(groups) != 2 or len(set(groups)) != 2 or not all(queries):
            raise InputError(f"a table of biases has two groups, each with a query or more; got {', '.join(groups)}")
        if not properties or ("{}" not in question and len(properties) > 1):
            raise InputError(f"give properties, and a question with {{}} for each, got {question!r}")
        if not size > 0:
            raise InputError(f"the size of a step is above 0, got {size}")
        super().__init__(
            joint,
            groups=list(groups),
            queries=[list(one) for one in queries],
            properties=list(properties),
            question=question,
            way=way,
            size=size,
            max_new_tokens=max_new_tokens,
        )

    def rows(self, vlm: VLM, sample: Sample) -> list[Row]:
        joint = self.joint(vlm)
        seen = joint.see(sample.image)
        changed = self._changed(joint, seen, sample.group == "second")
        asked = [self.settings["question"].format(one) for one in self.settings["properties"]]
        limit = self.settings["max_new_tokens"]
        before, after = (
            [number_in(said.text) for said in joint.generate([one] * len(asked), asked, max_new_tokens=limit)]
            for one in (seen, changed)
        )
        return [
            {"property": name, "group": sample.group, "before": one, "after": other}
            for name, one, other in zip(self.settings["properties"], before, after, strict=True)
        ]

    def _changed(self, joint: JointModel, seen: Seen, reverse: bool) -> Seen:
        lower, higher = (joint.owl.embed_queries(texts).clone() for texts in self.settings["queries"])
        lower, higher = (higher, lower) if reverse else (lower, higher)
        size, way = self.settings["size"], self.settings["way"]
        if way == SIGNED:
            return seen.with_tokens(signed_step(joint.owl, seen.vision, lower, higher, size))
        return seen.with_tokens(toward(joint.owl, seen.vision, lower, higher, size, way))

    def findings(self, rows: dict[str, list[Row]]) -> Report:
        every = [row for one in rows.values() for row in one]
        first, second = self.settings["groups"]
        directions = {"first": f"{first} → {second}", "second": f"{second} → {first}"}
        directions = {group: name for group, name in directions.items() if any(_of(row, group) for row in every)}
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for name in self.settings["properties"]:
            mine = [row for row in every if row["property"] == name]
            found[name] = {group: _effect([row for row in mine if _of(row, group)]) for group in directions}
        unread = sum(row["before"] is None or row["after"] is None for row in every)
        what = "each number of E moved by" if self.settings["way"] == SIGNED else "in shares of E's norm,"
        says = [
            f"{len(rows)} images; {what} {self.settings['size']:g}. A positive number: the property is ascribed more"
            " after the change."
        ]
        if unread:
            says.append(f"{unread} of {len(every)} pairs of answers have no number, and are left out.")
        table = Table(
            "Change of the score, mean ± 95 % interval over images",
            ["property", *(text for name in directions.values() for text in (name, "images", "before"))],
            [[name, *(text for one in groups.values() for text in _cells(one))] for name, groups in found.items()],
        )
        figures = {
            "pictures": len(rows),
            "unread": unread,
            "effects": {
                name: {directions[group]: one for group, one in groups.items()} for name, groups in found.items()
            },
        }
        chart = Chart(
            "bias-table",
            lambda figure: _draw(figure, found, directions),
            "The mean change of the score of each property, by direction. Bars: 95 % intervals.",
            (8.0, 1.4 + 0.55 * len(found)),
        )
        return Report(self.name, self.title, says, [table], [chart], figures)


def number_in(text: str) -> int | None:
    """Return the number from 0 to 10 that an answer is, in digits or as a word.

    It is None if the answer is anything else, as in the paper's scripts.
    """
    found = _NUMBER.fullmatch(text)
    if found is None:
        return None
    number = int(found[1]) if found[1] else _NUMBERS.index(found[2].lower())
    return number if number <= 10 else None


def _of(row: Row, group: str) -> bool:
    return (row["group"] == "second") == (group == "second")


def _effect(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the mean change, half its 95 % interval, the mean before, and the number of images."""
    read = [row for row in rows if row["before"] is not None and row["after"] is not None]
    mean, error = mean_and_error([row["after"] - row["before"] for row in read])
    return {
        "mean": mean,
        "interval": 1.96 * error,
        "before": mean_and_error([row["before"] for row in read])[0],
        "pictures": len(read),
    }


def _cells(one: dict[str, Any]) -> list[str]:
    return [
        cell((one["mean"], one["interval"])),
        str(one["pictures"]),
        cell((one["before"], float("nan"))),
    ]


def _draw(figure: Any, found: dict[str, dict[str, dict[str, Any]]], directions: dict[str, str]) -> None:
    axes = figure.subplots()
    names = list(found)[::-1]
    for i, (group, label) in enumerate(directions.items()):
        at = [place + 0.2 - 0.4 * i for place in range(len(names))]
        means = [found[name][group]["mean"] for name in names]
        errors = [found[name][group]["interval"] for name in names]
        axes.barh(at, means, height=0.36, xerr=errors, color=COLORS[i], capsize=2, label=label)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("change of the score (1 to 10)")
    axes.grid(axis="x", alpha=0.25)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
