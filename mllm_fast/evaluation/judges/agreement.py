"""Measure how far judges of descriptions agree with each other and with people.

The paper reports an agreement of 95 % (arXiv 2411.17491, section 4.2).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ...core.errors import InputError
from ..people import read_table, written_table
from ..report import Report, Table
from .endpoint import cost
from .judge import Judge, Unjudged

COLUMNS = ("reference", "said", "object", "label")
LABELS = ("tp", "fp", "fn")
Labels = Counter[tuple[str, str]]  # (object, label) -> how often


class Labelled(NamedTuple):
    """Two descriptions, and the labels of their objects."""

    reference: str
    said: str
    labels: Labels


def labels_csv(entries: Iterable[tuple[str, str, Sequence[tuple[str, str]]]]) -> str:
    """Return labels as a CSV table with one line for each label, for people to correct.

    Args:
        entries: (reference, said, [(object, label), ...]) of each pair of descriptions. A pair that comes twice is
            written once.
    """
    pairs = {(reference, said): labels for reference, said, labels in entries}  # duplicates merge
    rows = [
        [reference, said, name, label.upper()]
        for (reference, said), labels in pairs.items()
        for name, label in labels or [("", "")]
    ]
    return written_table([COLUMNS, *rows])


def read_labels(path: Path) -> list[Labelled]:
    """Read a CSV table of people's labels.

    The columns are reference, said, object and label (TP, FP or FN), with one line for each object. A pair of
    descriptions that name no object has one line without object and label.

    Raises:
        InputError: The file does not exist, a column is missing, or a label is not valid.
    """
    found: dict[tuple[str, str], Labels] = {}
    for place, row in read_table(path, COLUMNS, "a table of labels"):
        labels = found.setdefault((row["reference"], row["said"]), Counter())
        name, label = plain_name(row["object"]), row["label"].strip().lower()
        if not name and not label:
            continue
        if not name or label not in LABELS:
            raise InputError(
                f"{place}: a label is TP, FP or FN of an object, got {row['label']!r} of {row['object']!r}"
            )
        labels[name, label] += 1
    if not found:
        raise InputError(f"{path}: holds no descriptions")
    return [Labelled(*pair, labels) for pair, labels in found.items()]


def judged(pairs: Sequence[Labelled], judge: Judge) -> tuple[list[Labels | None], int]:
    """Return a judge's labels of each pair, and the number of tokens they cost.

    The labels are None where the judge gave no answer.
    """
    found: list[Labels | None] = []
    tokens = 0
    for pair in pairs:
        try:
            comparison = judge.compare(pair.reference, pair.said)
        except Unjudged as error:
            found.append(None)
            tokens += error.tokens
            continue
        found.append(Counter((plain_name(name), label) for name, label in comparison.labels))
        tokens += comparison.tokens
    return found, tokens


def agreement(ones: Iterable[Labels | None], others: Iterable[Labels | None]) -> tuple[int, int, int]:
    """Return how many labels are the same, and how many each side gave, over the pairs that both judged."""
    shared = first = second = 0
    for one, other in zip(ones, others, strict=True):
        if one is not None and other is not None:
            shared += (one & other).total()
            first += one.total()
            second += other.total()
    return shared, first, second


def agreement_report(pairs: Sequence[Labelled], judges: Mapping[str, Judge], price: float | None = None) -> Report:
    """Return a report that compares the judges with the people's labels and with each other."""
    labels: dict[str, list[Labels | None]] = {"people": [pair.labels for pair in pairs]}
    says, rows = (
        [f"{len(pairs)} pairs of descriptions, with {sum(p.labels.total() for p in pairs)} labels by people."],
        [],
    )
    figures: dict[str, dict[str, float | int | None]] = {}
    for name, judge in judges.items():
        labels[name], tokens = judged(pairs, judge)
        unjudged = labels[name].count(None)
        if unjudged:
            says.append(f"{name} gave no usable answer on {unjudged} pairs, which are left out.")
        if tokens:
            says.append(f"{name} took {cost(tokens, price)}.")
    names = list(labels)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            shared, first, second = agreement(labels[one], labels[other])
            same = 2 * shared / (first + second) if first + second else None
            figures[f"{one}, {other}"] = {"same": shared, one: first, other: second, "agreement": same}
            rows.append([f"{one}, {other}", str(shared), str(first), str(second), _percent(same)])
    table = Table(
        "Agreement on objects and their labels",
        ["first, second", "the same", "of the first", "of the second", "agreement"],
        rows,
        "An object is right (TP), not in the reference (FP) or missed (FN). Agreement: twice the labels that are the"
        " same over all labels of both.",
    )
    return Report("judges", "Do the judges agree?", says, [table], [], {"pairs": len(pairs), "agreement": figures})


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def plain_name(name: str) -> str:
    """Normalize an object's name, so that case, spaces and a leading article do not matter."""
    words = name.lower().split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)
