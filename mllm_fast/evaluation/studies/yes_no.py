"""Evaluations of yes-or-no benchmarks on compressed images.

See arXiv 2411.17491, table 1 and figure 9, and POPE, arXiv 2305.10355.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np

from ...context.compress import prefill_and_score
from ...context.scores import kept_count
from ...core.errors import InputError
from ..base import Evaluation, EvaluationOptions, mean_and_error
from ..judges.endpoint import Unanswered, cost
from ..registry import evaluation
from ..report import COLORS, Chart, Report, Table, cell
from ..rows import Row
from ..samples import Sample, YesNo

if TYPE_CHECKING:
    from ...vlm import VLM

_SAID = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
REDUNDANCY_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
FULL, QUERY, READER = "full", "query alone", "description to LLM"


class Way(NamedTuple):
    """The part of an image that a context keeps.

    Attributes:
        keep: The share of the image's tokens, as `VLM.compress` takes it.
        parts: The parts, as `VLM.compress` takes them.
    """

    keep: float
    parts: str

    @property
    def name(self) -> str:
        if self.parts == "query":
            return QUERY
        if self.parts == "image":
            return f"{100 * self.keep:g} % alone"
        return FULL if self.keep == 1 else f"query + {100 * self.keep:g} %"


def ways(shares: Iterable[float]) -> list[Way]:
    """Return the ways to compress an image for the shares K of its tokens.

    They are: everything, the query and K, the query alone, and K alone. Without shares there is only "everything".
    """
    shares = sorted(set(shares), reverse=True)
    if not shares:
        return [Way(1.0, "query+image")]
    both = [Way(share, "query+image") for share in shares if share != 1]
    return [Way(1.0, "query+image"), *both, Way(1.0, "query"), *(Way(share, "image") for share in shares)]


class Reader(Protocol):
    """A reader answers a question from a description.

    `settings` are plain JSON. `answer` returns the answer and its cost in tokens, or raises Unanswered.
    """

    @property
    def settings(self) -> dict[str, Any]: ...

    def answer(self, description: str, question: str) -> tuple[str, int]: ...


class YesNoBenchmark(Evaluation):
    """The base class of evaluations with yes-or-no questions.

    An image has one row for each question and each way to compress the image. The row has the answer ("said"), whether
    it means yes ("yes", None for neither yes nor no), and the number of tokens that a re-prompt reads ("tokens").

    Args:
        shares: The shares of the image tokens to keep; see `ways`.
        prompt: The prompt that the model answers before the image is compressed.
        max_new_tokens: The largest number of tokens in an answer.
        reader: A language model that adds one more way: it answers from the image's description. In its rows
            "unanswered" is the reason why there is no answer.
        price: The price of a million of the reader's tokens, in dollars.
    """

    def __init__(
        self,
        shares: Sequence[float] = (),
        prompt: str = "Describe the image.",
        max_new_tokens: int = 16,
        reader: Reader | None = None,
        price: float | None = None,
    ):
        for share in shares:
            kept_count(share, 100)
        self.shares = tuple(shares)
        self.reader = reader
        self.price = price  # in dollars per million of the reader's tokens; changes no row
        self.settings: dict[str, Any] = {
            "shares": list(self.shares),
            "prompt": prompt,
            "max_new_tokens": max_new_tokens,
            "reader": None if reader is None else reader.settings,
        }

    def rows(self, vlm: VLM, sample: Sample) -> list[Row]:
        if sample.problem:
            raise InputError(sample.problem)
        if not sample.questions:
            raise InputError(f"{sample.name}: has no yes-or-no questions")
        prefill = prefill_and_score(vlm, sample.image, self.settings["prompt"])
        texts = [question.text for question in sample.questions]
        found: list[Row] = []
        for way in ways(self.shares):
            context = prefill.context(way.keep, "generated", way.parts)
            answers = context.ask_many(texts, max_new_tokens=self.settings["max_new_tokens"])
            for question, answer in zip(sample.questions, answers, strict=True):
                asked = answer.layout.prompt_length - context.prefix_length
                found.append(_row(sample, way.name, question, answer.text, context.num_tokens + asked))
        if self.reader is not None:
            found += [self._read(self.reader, sample, question, prefill.description) for question in sample.questions]
        return found

    def _read(self, reader: Reader, sample: Sample, question: YesNo, description: str) -> Row:
        try:
            said, paid = reader.answer(description, question.text)
        except Unanswered as error:
            return _row(sample, READER, question, "", None) | {"paid": error.tokens, "unanswered": str(error)}
        return _row(sample, READER, question, said, None) | {"paid": paid}

    def asides(self, rows: dict[str, list[Row]]) -> tuple[dict[str, list[Row]], list[str]]:
        """Leave out the rows of each image and way with an unanswered question, so that only whole images count.

        Returns:
            The rows that are left, and sentences about the rows left out and about the reader's cost.
        """
        every = [(name, row) for name, one in rows.items() for row in one]
        says, paid = [], sum(row.get("paid", 0) for _, row in every)
        gone = {(name, row["way"]): row["unanswered"] for name, row in every if "unanswered" in row}
        if gone:
            why = next(iter(gone.values()))
            says.append(f"{READER}: {len(gone)} of {len(rows)} images are left out, without an answer: {why}.")
        if paid:
            says.append(f"{READER}: its answers took {cost(paid, self.price)}.")
        return {name: [row for row in one if (name, row["way"]) not in gone] for name, one in rows.items()}, says


def _row(sample: Sample, way: str, question: YesNo, said: str, tokens: int | None) -> Row:
    return {
        "way": way,
        "group": sample.group,
        "question": question.text,
        "truth": question.truth,
        "said": said,
        "yes": meaning(said),
        "tokens": tokens,
    }


def meaning(said: str) -> bool | None:
    """Return whether an answer means yes, by the first yes or no in it, or None if it has neither."""
    found = _SAID.search(said)
    return None if found is None else found[1].lower() == "yes"


def accuracies(samples: Iterable[Sequence[Row]]) -> dict[str, float]:
    """Return MME's figures of one way.

    Returns:
        "ACC", the share of right answers; "ACC+", the share of images with only right answers; "neither", the share of
        answers that are neither yes nor no, which count as wrong (all in %); "tokens", the mean number of tokens that a
        re-prompt reads.
    """
    right = [[row["yes"] == row["truth"] for row in rows] for rows in samples]
    every = [row for rows in samples for row in rows]
    mean = lambda values: mean_and_error(list(values))[0]  # noqa: E731
    return {
        "ACC": 100 * mean(value for one in right for value in one),
        "ACC+": 100 * mean(map(all, right)),
        "neither": 100 * mean(row["yes"] is None for row in every),
        "tokens": mean(row["tokens"] for row in every if row["tokens"] is not None),
    }


def detection(rows: Sequence[Row]) -> dict[str, float | None]:
    """Return POPE's figures in %, with yes as the positive answer. A figure is None where nothing can be counted.

    An answer that is neither yes nor no counts as wrong, and not as yes.
    """
    share = lambda part, whole: 100 * part / whole if whole else None  # noqa: E731
    said = [row["yes"] is True for row in rows]
    hits = sum(yes and row["truth"] for yes, row in zip(said, rows, strict=True))
    truths = sum(row["truth"] for row in rows)
    return {
        "accuracy": share(sum(row["yes"] == row["truth"] for row in rows), len(rows)),
        "precision": share(hits, sum(said)),
        "recall": share(hits, truths),
        "F1": share(2 * hits, sum(said) + truths),
        "yes": share(sum(said), len(rows)),
        "neither": share(sum(row["yes"] is None for row in rows), len(rows)),
    }


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _pair(figures: dict[str, float]) -> str:
    return f"{_number(figures['ACC'], 0)}/{_number(figures['ACC+'], 0)}"


@evaluation
class Mme(YesNoBenchmark):
    """MME's ACC and ACC+ of each way, per task and over all (arXiv 2411.17491, table 1)."""

    name: ClassVar[str] = "mme"
    title: ClassVar[str] = "Yes-or-no questions, answered from what is left of an image"
    benchmark: ClassVar[str] = "mme"

    @classmethod
    def from_options(cls, options: EvaluationOptions) -> Evaluation:
        return cls(options.shares or (0.02, 0.05), options.prompt, reader=options.reader, price=options.price)

    def findings(self, rows: dict[str, list[Row]]) -> Report:
        rows, asides = self.asides(rows)
        named = list(dict.fromkeys(row["way"] for one in rows.values() for row in one))
        groups = sorted({one[0]["group"] for one in rows.values()})
        of = lambda way, group=None: [  # noqa: E731
            found
            for one in rows.values()
            if group in (None, one[0]["group"]) and (found := [row for row in one if row["way"] == way])
        ]
        total = {way: accuracies(of(way)) for way in named}
        each = {group: {way: accuracies(of(way, group)) for way in named} for group in groups}
        same = sum(len({row["truth"] for row in one}) == 1 for one in rows.values())
        tasks = f"{len(groups)} task{'s' * (len(groups) != 1)}"
        says = [f"{len(rows)} images in {tasks}; answers that are neither yes nor no count as wrong."]
        says += asides
        if same:
            says.append(f"Both answers are the same for {same} images.")
        columns = ["ACC", "ACC+", "neither", "tokens"]
        tables = [
            Table(
                "Over all, %, and tokens that a re-prompt reads",
                ["kept", *columns],
                [[way, *(_number(total[way][column]) for column in columns)] for way in named],
            ),
            Table(
                "ACC/ACC+ per task, %",
                ["task", *named],
                [[g, *(_pair(each[g][w]) for w in named)] for g in groups],
            ),
        ]
        figures = {"samples": len(rows), "same answers": same, "total": total, "tasks": each}
        return Report(self.name, self.title, says, tables, [], figures)


@evaluation
class Redundancy(YesNoBenchmark):
    """Accuracy over the share of image tokens kept, with and without the query (arXiv 2411.17491, figure 9)."""

    name: ClassVar[str] = "redundancy"
    title: ClassVar[str] = "How many image tokens does an answer need?"
    benchmark: ClassVar[str] = "mme"

    @classmethod
    def from_options(cls, options: EvaluationOptions) -> Evaluation:
        return cls(
            options.shares or REDUNDANCY_SHARES, prompt=options.prompt, reader=options.reader, price=options.price
        )

    def __init__(self, shares: Sequence[float] = REDUNDANCY_SHARES, **settings: Any):
        super().__init__(shares or (1.0,), **settings)

    def findings(self, rows: dict[str, list[Row]]) -> Report:
        rows, asides = self.asides(rows)
        found: dict[str, tuple[float, float, float]] = {}
        for way in dict.fromkeys(row["way"] for one in rows.values() for row in one):
            every = ([row["yes"] == row["truth"] for row in one if row["way"] == way] for one in rows.values())
            right = [one for one in every if one]
            read = [row["tokens"] for one in rows.values() for row in one if row["way"] == way]
            tokens = mean_and_error([count for count in read if count is not None])[0]
            found[way] = *mean_and_error([100 * float(np.mean(one)) for one in right]), tokens
        says = [
            f"{len(rows)} images: {found[FULL][0]:.1f} % right with all image tokens ({found[FULL][2]:.0f} tokens a"
            f" re-prompt), {found[QUERY][0]:.1f} % with the query alone ({found[QUERY][2]:.0f}).",
            *asides,
        ]
        table = Table(
            "Right answers, % ± standard error over images",
            ["kept", "right", "tokens a re-prompt"],
            [[way, cell((mean, error), 1), _number(tokens, 0)] for way, (mean, error, tokens) in found.items()],
        )
        chart = Chart(
            "redundancy",
            lambda figure: self._draw(figure, found),
            "Right answers over the share of image tokens that each layer keeps, with the query's tokens and without;"
            " lines: everything, and the query alone. Bars are standard errors.",
        )
        figures = {"samples": len(rows), "right": {way: values[0] for way, values in found.items()}}
        return Report(self.name, self.title, says, [table], [chart], figures)

    def _draw(self, figure: Any, found: dict[str, tuple[float, float, float]]) -> None:
        axes = figure.subplots()
        axes.axhline(found[FULL][0], color="#333333", label="everything")
        axes.axhline(found[QUERY][0], color="#333333", linestyle=":", label=QUERY)
        looks = (("query+image", COLORS[0], "o", "-", "query + K"), ("image", COLORS[1], "s", "--", "K alone"))
        for parts, color, mark, style, label in looks:
            shares = [share for share in self.shares if share < 1 or parts == "image"]
            values = [found[Way(share, parts).name] for share in shares]
            means, errors = [mean for mean, _, _ in values], [error for _, error, _ in values]
            at = [100 * share for share in shares]
            axes.errorbar(at, means, errors, color=color, marker=mark, linestyle=style, capsize=2, label=label)
        axes.set_xscale("log")
        axes.set_xticks([100 * share for share in self.shares], [f"{100 * share:g}" for share in self.shares])
        axes.minorticks_off()
        axes.set_xlabel("image tokens kept in each layer, K (%)")
        axes.set_ylabel("right answers (%)")
        axes.set_ylim(0, 104)
        axes.grid(alpha=0.25)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)


@evaluation
class Pope(YesNoBenchmark):
    """POPE's random, popular and adversarial questions, which test whether a model sees objects that are not there."""

    name: ClassVar[str] = "pope"
    title: ClassVar[str] = "Does the model see what is not there?"
    benchmark: ClassVar[str] = "pope"

    @classmethod
    def from_options(cls, options: EvaluationOptions) -> Evaluation:
        return cls(options.shares, options.prompt, reader=options.reader, price=options.price)

    def findings(self, rows: dict[str, list[Row]]) -> Report:
        rows, asides = self.asides(rows)
        every = [row for one in rows.values() for row in one]
        named = list(dict.fromkeys((row["group"], row["way"]) for row in every))
        found = {
            f"{group}, {way}": detection([row for row in every if (row["group"], row["way"]) == (group, way)])
            for group, way in named
        }
        columns = list(next(iter(found.values())))
        table = Table(
            "Yes is the positive answer, %",
            ["questions, kept", *columns],
            [[name, *(_number(values[column]) for column in columns)] for name, values in found.items()],
            "An answer that is neither yes nor no counts as wrong, and not as yes.",
        )
        says = [f"{sum(row['way'] == FULL for row in every)} questions about {len(rows)} images.", *asides]
        return Report(self.name, self.title, says, [table], [], {"samples": len(rows), "figures": found})
