"""Measure what a description names when it sees few of the image's tokens (arXiv 2411.17491, figures 9 and A7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ...context.compress import prefill_and_score
from ..base import Evaluation, EvaluationOptions
from ..registry import evaluation
from ..report import COLORS, Chart, Report, Table
from ..rows import Row
from ..samples import Sample
from .descriptions import FIGURES, DescriptionEvaluation, cell_of, finite, means_of

if TYPE_CHECKING:
    from ...vlm import VLM

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@evaluation
class FewTokens(DescriptionEvaluation):
    """An evaluation of descriptions of which the generated tokens see the query and few image tokens.

    An image has one row for its description, and one for each share K: in each layer the K % of the image tokens stay
    that the description attends to most, and the model answers the prompt again from what is left. The share 0 leaves
    the query's tokens alone.

    Args:
        shares: The shares of the image tokens that stay.
        settings: The settings of `DescriptionEvaluation`.
    """

    name: ClassVar[str] = "few-tokens"
    title: ClassVar[str] = "What a description names from few image tokens"

    @classmethod
    def from_options(cls, options: EvaluationOptions) -> Evaluation:
        return cls(options.shares or SHARES, **cls.common(options))

    def __init__(self, shares: Sequence[float] = SHARES, **settings: Any):
        super().__init__(**settings)
        self.shares = tuple(sorted(set(shares)))
        self.settings["shares"] = list(self.shares)

    def rows(self, vlm: VLM, sample: Sample) -> list[Row]:
        limit, prompt = self.settings["max_new_tokens"], self.settings["prompt"]
        prefill = prefill_and_score(vlm, sample.image, prompt, ["generated"], max_new_tokens=limit)
        answer = prefill.description
        reference = self.reference(sample, answer)
        found = [{"keep": None, "said": answer, "reference": reference, **self.judged(reference, answer)}]
        for share in (0.0, *self.shares):
            kept = prefill.context(share or 1.0, "generated", "query+image" if share else "query")
            said = kept.describe(max_new_tokens=limit).text
            same = {"same": said == answer}
            found.append({"keep": share, "said": said, **same, **self.judged(reference, said)})
        return found

    def findings(self, rows: dict[str, list[Row]]) -> Report:
        first = next(iter(rows.values()))
        found = {row["keep"]: means_of([one[i] for one in rows.values()]) for i, row in enumerate(first)}
        same = {
            row["keep"]: float(np.mean([one[i]["same"] for one in rows.values()])) for i, row in enumerate(first) if i
        }
        each = [f"{found[share]['f1'][0]:.2f} with {100 * share:g} %" for share in self.shares]
        says = [
            f"Objects that the model names, against {self.compared}, over {len(rows)} images. From the query's tokens"
            f" alone F1 is {found[0.0]['f1'][0]:.2f}; of the image tokens {', '.join(each)}.",
        ]
        asides, counts = self.asides(row for one in rows.values() for row in one)
        table = Table(
            "Objects named from the share K of the image tokens, mean over images ± standard error",
            ["K, %", *FIGURES, "word for word, %"],
            [
                [
                    "the description" if keep is None else f"{100 * keep:g}",
                    *(cell_of(means[figure]) for figure in FIGURES),
                    "-" if keep is None else f"{100 * same[keep]:.1f}",
                ]
                for keep, means in found.items()
            ],
            "Word for word: how many descriptions are the same as that of the whole image.",
        )
        chart = Chart(
            "few-tokens",
            lambda figure: _draw(figure, {keep: means for keep, means in found.items() if keep}, found[0.0]),
            "F1 of the named objects over the share of image tokens that each layer keeps; the line is the query alone."
            " Bars are standard errors.",
        )
        means = [{"keep": keep, "same": same.get(keep), **finite(one)} for keep, one in found.items()]
        figures = {"samples": len(rows), **counts, "means": means}
        return Report(self.name, self.title, [*says, *asides], [table], [chart], figures)


def _draw(figure: Any, found: dict[float, dict], alone: dict[str, tuple[float, float]]) -> None:
    axes = figure.subplots()
    at = [100 * share for share in found]
    means, errors = zip(*(one["f1"] for one in found.values()), strict=True)
    axes.errorbar(at, means, errors, color=COLORS[0], marker="o", capsize=2, label="query + K")
    axes.axhline(alone["f1"][0], color="#333333", linestyle=":", label="query alone")
    axes.set_xscale("log")
    axes.set_xticks(at, [f"{value:g}" for value in at])
    axes.minorticks_off()
    axes.set_xlabel("image tokens kept in each layer, K (%)")
    axes.set_ylabel("F1 of the named objects")
    axes.set_ylim(-0.03, 1.03)
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
