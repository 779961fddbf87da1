"""Measure a judge against people who are asked single questions (arXiv 2411.17491, appendix B, table A1).

A rater sees one description and one object, and says whether the description mentions it. The judge's answers to the
same questions follow from its labels: an object that is right is in both descriptions, one that is missed in the
reference alone, and one that is made up in the other alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...core.errors import InputError
from ..people import filled_page, read_table
from ..report import Report, Table
from .agreement import Labelled, plain_name

COLUMNS = ("description", "object", "rater", "answer")
_PAGE = Path(__file__).with_name("ratings.html")
_MENTIONED = {"tp": (True, True), "fn": (True, False), "fp": (False, True)}  # in the reference, in the other one

Question = tuple[str, str]  # a description and an object


class Rating(NamedTuple):
    """One rater's answer to one question: whether a description mentions an object."""

    question: Question
    rater: str
    mentioned: bool


def questions(pairs: Sequence[Labelled]) -> dict[Question, bool]:
    """Return the questions that a judge's labels answer, with its answers.

    Questions to which different labels give different answers are left out.
    """
    found: dict[Question, set[bool]] = {}
    for pair in pairs:
        for name, label in pair.labels:
            for description, mentioned in zip((pair.reference, pair.said), _MENTIONED[label], strict=True):
                if description.strip():
                    found.setdefault((description, name), set()).add(mentioned)
    return {question: answers.pop() for question, answers in found.items() if len(answers) == 1}


def rating_page(pairs: Sequence[Labelled], count: int | None = None, seed: int = 0) -> str:
    """Return a page on which a rater answers the questions, in a random order, and saves the answers as CSV.

    The page loads nothing from elsewhere, keeps what was answered in the browser, and does not show the judge's
    answers.

    Args:
        pairs: The judge's labels.
        count: The number of questions, a random sample; None for all.
        seed: The seed of the sample and of the order.

    Raises:
        InputError: There is no question.
    """
    every = list(questions(pairs))
    if not every:
        raise InputError("the labels name no object that a rater could be asked about")
    order = np.random.default_rng(seed).permutation(len(every))[:count]
    return filled_page(_PAGE, [{"description": every[i][0], "object": every[i][1]} for i in order])


def read_ratings(files: Iterable[Path]) -> list[Rating]:
    """Read the raters' answers from CSV tables with the columns description, object, rater and answer (yes or no).

    Raises:
        InputError: A file does not exist, a column is missing, an answer is neither yes nor no, or a rater answers one
            question twice.
    """
    found: dict[tuple[Question, str], bool] = {}
    for file in files:
        for place, row in read_table(file, COLUMNS, "a table of ratings"):
            said = row["answer"].strip().lower()
            if said not in ("yes", "no"):
                raise InputError(f"{place}: an answer is yes or no, got {row['answer']!r}")
            key = (row["description"], plain_name(row["object"])), row["rater"].strip()
            if found.setdefault(key, said == "yes") != (said == "yes"):
                raise InputError(f"{place}: {key[1] or 'a rater'} says both yes and no here")
    if not found:
        raise InputError("there is no rating")
    return [Rating(question, rater, mentioned) for (question, rater), mentioned in found.items()]


def ratings_report(pairs: Sequence[Labelled], ratings: Sequence[Rating]) -> Report:
    """Return table A1: the judge's answers against those of people.

    Ratings that contradict the majority of their question are dropped, and so are questions without a majority. The
    people's agreement is the share of the ratings that were kept.
    """
    told = questions(pairs)
    each: dict[Question, Counter[bool]] = {}
    for rating in ratings:
        each.setdefault(rating.question, Counter())[rating.mentioned] += 1
    unknown = sum(counts.total() for question, counts in each.items() if question not in told)
    known = {question: counts for question, counts in each.items() if question in told}
    counted: Counter[tuple[bool, bool]] = Counter()  # (judge, people)
    total = 0
    for question, counts in known.items():
        total += counts.total()
        if counts[True] != counts[False]:
            majority = counts[True] > counts[False]
            counted[told[question], majority] += counts[majority]
    kept = counted.total()
    yes, no = (counted[True, side] + counted[False, side] for side in (True, False))
    rates = {
        "true positive rate": _share(counted[True, True], yes),
        "true negative rate": _share(counted[False, False], no),
        "accuracy": _share(counted[True, True] + counted[False, False], kept),
        "agreement of the raters": _share(kept, total),
    }
    says = [
        f"{total} ratings of {len(known)} questions by {len({one.rater for one in ratings})} raters;"
        f" {total - kept} that contradict the majority, or have none, are dropped."
    ]
    if unknown:
        says.append(f"{unknown} ratings are of questions that the labels do not answer, and are left out.")
    table = Table(
        "The judge's answers against the people's, in ratings (table A1)",
        ["", "people: yes", "people: no"],
        [
            [f"judge: {'yes' if side else 'no'}", str(counted[side, True]), str(counted[side, False])]
            for side in (True, False)
        ],
    )
    measures = Table(
        "How often the judge is right",
        ["measure", "%"],
        [[name, "-" if value is None else f"{100 * value:.1f}"] for name, value in rates.items()],
        "The paper reports 95.2, 96.5 and 95.7 % for its judge, and 92.2 % for its raters.",
    )
    figures = {
        "ratings": total,
        "kept": kept,
        "questions": len(known),
        "unknown": unknown,
        "confusion": {
            f"judge {j}, people {p}": counted[j == "yes", p == "yes"] for j in ("yes", "no") for p in ("yes", "no")
        },
        **rates,
    }
    return Report("judges", "Does the judge agree with people?", says, [table, measures], [], figures)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
