"""Measure whether a word looks at its object (arXiv 2411.17491, figures 6 and 7).

The peaks of the word's attention in each layer and of its log-probability heatmap are compared with the object's mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from ..base import Evaluation, EvaluationOptions, mean_and_error
from ..registry import evaluation
from ..report import COLORS, Chart, Report, Table
from ..rows import Row
from ..samples import Sample
from .word_alignment import Word, WordEvaluation

if TYPE_CHECKING:
    from ...explain.explanation import Explanation
    from ...vlm import VLM

BANDS = ("first third", "middle third", "last third", "all layers")


@evaluation
class Localisation(WordEvaluation):
    """An evaluation of whether the peak of a word's heatmap lies at the word's object.

    There is one row for each word that names an object of the image. The attention and the log-probability increase are
    those of the row that the noun's first token is predicted from. An object's mask covers all objects of its name, and
    is widened by `near` tokens (by default one) on every side. The heatmaps are the mean attention over heads of each
    layer and of each third of the layers, and the log-probability increase of the ten best heads. "chance" is the share
    of the image's tokens that count as hits.
    """

    name: ClassVar[str] = "localisation"
    title: ClassVar[str] = "Does a word look at its object?"
    needs_masks: ClassVar[bool] = True

    @classmethod
    def from_options(cls, options: EvaluationOptions) -> Evaluation:
        return cls(options.prompt, options.words, max_new_tokens=options.answer_tokens)

    def rows(self, vlm: VLM, sample: Sample) -> list[Row]:
        ex, words = self.explained(vlm, sample)
        return [{"thing": word.name, "token": word.token, **_peaks(ex, word)} for word in words]

    def findings(self, rows: dict[str, list[Row]]) -> Report:
        words = [row for one in rows.values() for row in one]
        if not words:
            return self.nothing("No word named an object of its image.")
        chance = float(np.mean([row["chance"] for row in words]))
        layers = [mean_and_error([row["layers"][i] for row in words]) for i in range(len(words[0]["layers"]))]
        bands = {name: mean_and_error([row["bands"][name] for row in words]) for name in words[0]["bands"]}
        logprob = mean_and_error([row["logprob"] for row in words])
        best = int(np.argmax([mean for mean, _ in layers]))
        says = [
            f"{len(words)} words that name an object, of {len(rows)} images. The highest token of a word's"
            f" log-probability map lies at its object in {logprob[0]:.1%}; that of its attention in"
            f" {layers[best][0]:.1%} in layer {best}, the best one, and in {bands['all layers'][0]:.1%} averaged over"
            f" all layers. Chance is {chance:.1%}."
        ]
        cell = lambda value: f"{100 * value[0]:.1f} ± {100 * value[1]:.1f}"  # noqa: E731
        table = Table(
            f"Peak within {self.settings['near']} token of the object's mask, % ± standard error",
            ["map", "at the object"],
            [
                ["log-probability increase", cell(logprob)],
                *([f"attention, {name}", cell(bands[name])] for name in bands),
                *([f"attention, layer {i}", cell(value)] for i, value in enumerate(layers)),
                ["chance", f"{100 * chance:.1f}"],
            ],
        )
        figures = {"words": len(words), "logprob": logprob[0], "chance": chance, "layers": [mean for mean, _ in layers]}
        figures["bands"] = {name: mean for name, (mean, _) in bands.items()}
        chart = Chart(
            "localisation",
            lambda figure: _draw(figure, layers, logprob, chance),
            "How often the highest token of a word's attention lies at its object, layer by layer; beside it the word's"
            " log-probability map, and chance. Bars and the band are standard errors.",
        )
        return Report(self.name, self.title, says, [table], [chart], figures)


def _peaks(ex: Explanation, word: Word) -> Row:
    layout = ex.layout.images[0]
    attention = ex.attention(word.token).mean(1)[:, layout.positions]  # [layers, tokens]
    thirds = np.array_split(np.arange(len(attention)), 3)
    parts = dict(zip(BANDS, [*thirds, np.arange(len(attention))], strict=True))
    peak = lambda values: bool(word.hits.flat[int(values.argmax())])  # noqa: E731

    def at(values: Tensor) -> bool:
        return peak(layout.to_grid(values))

    return {
        "layers": [at(values) for values in attention],
        "bands": {name: at(attention[which].mean(0)) for name, which in parts.items() if len(which)},
        "logprob": peak(ex.heatmap(word.token)),
        "chance": float(word.hits.mean()),
    }


def _draw(figure: Any, layers: list, logprob: tuple[float, float], chance: float) -> None:
    axes = figure.subplots()
    means, errors = (100 * np.array(values) for values in zip(*layers, strict=True))
    numbers = np.arange(len(layers))
    axes.axhspan(
        100 * (logprob[0] - logprob[1]), 100 * (logprob[0] + logprob[1]), color=COLORS[0], alpha=0.2, linewidth=0
    )
    axes.axhline(100 * logprob[0], color=COLORS[0], label="log-probability map")
    axes.errorbar(
        numbers, means, errors, color=COLORS[1], marker="s", linestyle="--", capsize=2, label="attention of a layer"
    )
    axes.axhline(100 * chance, color="#777777", linestyle=":", label="chance")
    axes.set_xticks(numbers[:: max(1, len(numbers) // 16)])
    axes.set_xlabel("layer")
    axes.set_ylabel("peak at the object (% of words)")
    axes.set_ylim(0, 103)
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
