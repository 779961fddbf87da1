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
from ...core.errors import InputError, check_choice
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
NAIVE, FULL, QUERY, READER = "naive", "full", "query alone", "description to LLM"
DESCRIPTION_TOKENS = 300  # of a description, at most, before an image is compressed
PARSERS = ("mme", "first")
# the paper's ten, of MME's fourteen
PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip


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
        description_tokens: The largest number of tokens in the model's answer to `prompt`.
        naive: Whether one more way asks the question itself about the image, from the start.
        parser: How an answer is read: "mme" as MME's own script does, or "first", by the first yes or no.
    """

    def __init__(
        self,
        shares: Sequence[float] = (),
        prompt: str = "Describe the image.",
        max_new_tokens: int = 16,
        reader: Reader | None = None,
        price: float | None = None,
        *,
        description_tokens: int = DESCRIPTION_TOKENS,
        naive: bool = False,
        parser: str = "first",
    ):
        check_choice("parser", parser, PARSERS)
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
            "description_tokens": description_tokens,
            "naive": naive,
            "parser": parser,
        }

    def rows(self, vlm: VLM, sample: Sample) -> list[Row]:
        if sample.problem:
            raise InputError(sample.problem)
        if not sample.questions:
            raise InputError(f"{sample.name}: has no yes-or-no questions")
        described = self.settings["description_tokens"]
        prefill = prefill_and_score(vlm, sample.image, self.settings["prompt"], max_new_tokens=described)
        texts = [question.text for question in sample.questions]
        found: list[Row] = []
        for question in sample.questions if self.settings["naive"] else ():
            said = vlm.generate(sample.image, question.text, max_new_tokens=self.settings["max_new_tokens"])
            found.append(self._row(sample, NAIVE, question, said.text, said.layout.prompt_length))
        for way in ways(self.shares):
            context = prefill.context(way.keep, "generated", way.parts)
            answers = context.ask_many(texts, max_new_tokens=self.settings["max_new_tokens"])
            for question, answer in zip(sample.questions, answers, strict=True):
                asked = answer.layout.prompt_length - context.prefix_length
                found.append(self._row(sample, way.name, question, answer.text, context.num_tokens + asked))
        if self.reader is not None:
            ids = vlm.processor.tokenizer
            for question in sample.questions:
                tokens = len(ids(f"{prefill.description} {question.text}", add_special_tokens=False).input_ids)
                found.append(self._read(self.reader, sample, question, prefill.description, tokens))
        return found

    def _row(self, sample: Sample, way: str, question: YesNo, said: str, tokens: int | None) -> Row:
        return {
            "way": way,
            "group": sample.group,
            "question": question.text,
            "truth": question.truth,
            "said": said,
            "yes": (meaning_by_mme if self.settings["parser"] == "mme" else meaning)(said),
            "tokens": tokens,
        }

    def _read(self, reader: Reader, sample: Sample, question: YesNo, description: str, tokens: int) -> Row:
        try:
            said, paid = reader.answer(description, question.text)
        except Unanswered as error:
            row = self._row(sample, READER, question, "", tokens)
            return row | {"paid": error.tokens, "unanswered": str(error)}
        return self._row(sample, READER, question, said, tokens) | {"paid": paid}

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


def meaning(said: str) -> bool | None:
    """Return whether an answer means yes, by the first yes or no in it, or None if it has neither."""
    found = _SAID.search(said)
    return None if found is None else found[1].lower() == "yes"


def meaning_by_mme(said: str) -> bool | None:
    """Return whether an answer means yes as MME's own script decides, by the first four characters of the answer.

    "Yes" there means yes, else "no" there means no. The script takes the answer without the space around it.
    """
    begin = said.strip().lower()[:4]
    return True if "yes" in begin else False if "no" in begin else None


def mean_over_tasks(tasks: Iterable[dict[str, float]]) -> dict[str, float]:
    """Return the unweighted mean of each of MME's figures over tasks, of which each is one of `accuracies`.

    A task without any token count, or any answer, is left out of that mean.
    """
    every = list(tasks)
    return {
        name: mean_and_error([one[name] for one in every if not math.isnan(one[name])])[0]
        for name in ("ACC", "ACC+", "neither", "tokens")
    }


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


def _table(title: str, found: dict[str, dict[str, float]]) -> Table:
    """Return MME's figures of each way, and its ACC and tokens as shares of the naive way's."""
    naive = found.get(NAIVE)
    columns = ["ACC", "ACC+", "neither", "tokens"]
    if naive is None:
        return Table(
            title, ["kept", *columns], [[way, *(_number(one[c]) for c in columns)] for way, one in found.items()]
        )
    share = lambda one, name: _number(100 * one[name] / naive[name] if naive[name] else math.nan)  # noqa: E731
    rows = [
        [way, *(_number(one[c]) for c in columns), share(one, "ACC"), share(one, "tokens")]
        for way, one in found.items()
    ]
    return Table(title, ["kept", *columns, "ACC of naive, %", "tokens of naive, %"], rows)


def _common(options: EvaluationOptions) -> dict[str, Any]:
    described = options.max_new_tokens or DESCRIPTION_TOKENS
    return {"reader": options.reader, "price": options.price, "description_tokens": described}


def _read_by(options: EvaluationOptions) -> dict[str, Any]:
    return {} if options.parser is None else {"parser": options.parser}


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _pair(figures: dict[str, float]) -> str:
    return f"{_number(figures['ACC'], 0)}/{_number(figures['ACC+'], 0)}"


@evaluation
class Mme(YesNoBenchmark):
    """MME's ACC and ACC+ of each way, per task, as the mean over tasks and over all (arXiv 2411.17491, table 1).

    The way "naive" asks each question about the image from the start. "full" asks it in a second turn, after the
    model's answer to `prompt`.

    Args:
        tasks: The names of the tasks that count; by default the ten of perception, if a folder has any of them.
        settings: The settings of `YesNoBenchmark`.
    """

    name: ClassVar[str] = "mme"
    title: ClassVar[str] = "Yes-or-no questions, answered from what is left of an image"
    benchmark: ClassVar[str] = "mme"

    @classmethod
    def from_options(cls, options: EvaluationOptions) -> Evaluation:
        shares = options.shares or (0.02, 0.05)
        return cls(shares, options.prompt, tasks=options.tasks, parser=options.parser or "mme", **_common(options))

    def __init__(self, *given: Any, tasks: Sequence[str] = (), parser: str = "mme", **settings: Any):
        super().__init__(*given, naive=True, parser=parser, **settings)
        self.tasks = tuple(tasks)

    def findings(self, rows: dict[str, list[Row]]) -> Report:
        rows, asides = self.asides(rows)
        there = {one[0]["group"] for one in rows.values()}
        counted = set(self.tasks) or (there & set(PERCEPTION)) or there
        if not counted <= there:
            raise InputError(f"--task is one of {', '.join(sorted(there))}, got {', '.join(sorted(counted - there))}")
        left_out = sorted(there - counted)
        rows = {name: one for name, one in rows.items() if one[0]["group"] in counted}
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
        mean = {way: mean_over_tasks(each[group][way] for group in groups) for way in named}
        tasks = f"{len(groups)} task{'s' * (len(groups) != 1)}"
        says = [f"{len(rows)} images in {tasks}; answers that are neither yes nor no count as wrong."]
        says += asides
        if left_out:
            says.append(f"The tasks {', '.join(left_out)} do not count.")
        if same:
            says.append(f"Both answers are the same for {same} images.")
        tables = [
            _table("Mean over the tasks, %, and tokens that a re-prompt reads", mean),
            _table("Over all, %, and tokens that a re-prompt reads", total),
            Table(
                "ACC/ACC+ per task, %",
                ["task", *named],
                [[g, *(_pair(each[g][w]) for w in named)] for g in groups],
            ),
        ]
        figures = {"samples": len(rows), "same answers": same, "mean": mean, "total": total, "tasks": each}
        return Report(self.name, self.title, says, tables, [], figures)


@evaluation
class Redundancy(YesNoBenchmark):
    """Right yes-or-no answers over the share of image tokens kept, with and without the query.

    Figure 9 of arXiv 2411.17491 has the descriptions themselves over that share, see `FewTokens`.
    """

    name: ClassVar[str] = "redundancy"
    title: ClassVar[str] = "How many image tokens does an answer need?"
    benchmark: ClassVar[str] = "mme"

    @classmethod
    def from_options(cls, options: EvaluationOptions) -> Evaluation:
        return cls(options.shares or REDUNDANCY_SHARES, prompt=options.prompt, **_read_by(options), **_common(options))

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
        return cls(options.shares, options.prompt, **_read_by(options), **_common(options))

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
