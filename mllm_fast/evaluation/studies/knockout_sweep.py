"""Measure what a description still names when the image is knocked out (arXiv 2411.17491, figures 2e, 2f and 5)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ...core.errors import InputError
from ...knockout.rule import Knockout
from ..base import Evaluation, EvaluationOptions
from ..judges.agreement import labels_csv
from ..registry import evaluation
from ..report import COLORS, Chart, Report, Table
from ..rows import Row
from ..samples import Sample
from .descriptions import FIGURES, DescriptionEvaluation, cell_of, finite, means_of

if TYPE_CHECKING:
    from ...vlm import VLM

TARGETS = ("generated", "query", "query+generated")
# the text is all of the prompt but the image's block, as in the paper: marks around an image belong to it
_TEXT = {"generated": "generated", "query": "text", "query+generated": "text+generated"}
_BANDS = {80: "20-40", 32: "4-20"}  # the paper's, by the number of layers of its two models
_LOOKS = {"generated": ("o", "-"), "query": ("s", "--"), "query+generated": ("^", "-.")}
_STARTS = 16  # the largest number of starting layers to try in a deep model, evenly spaced


@evaluation
class KnockoutSweep(DescriptionEvaluation):
    """An evaluation of descriptions under knockouts of image -> target.

    An image has one row for each configuration. A configuration knocks out a target from a layer on, knocks it out in
    all layers except a band, or knocks out nothing. The image is its block, row ends and marks between tiles included,
    and the target "query" is all text of the prompt.

    Args:
        bands: The bands of layers that stay open, such as "20-40" (both included). By default it is the paper's for a
            model of 80 or 32 layers, else the middle half.
        settings: The settings of `DescriptionEvaluation`.
    """

    name: ClassVar[str] = "knockout-sweep"
    title: ClassVar[str] = "What a description still names with the image knocked out"

    @classmethod
    def from_options(cls, options: EvaluationOptions) -> Evaluation:
        return cls(options.bands, **cls.common(options))

    def __init__(self, bands: Sequence[str] = (), **settings: Any):
        for band in bands:
            if not re.fullmatch(r"\d+-\d+", band):
                raise InputError(f"a band is the first and the last layer that stay open, such as 20-40, got {band!r}")
        super().__init__(**settings)
        self.bands = tuple(dict.fromkeys(bands))
        if bands:
            self.settings["bands"] = list(self.bands)

    def rows(self, vlm: VLM, sample: Sample) -> list[Row]:
        limit, prompt = self.settings["max_new_tokens"], self.settings["prompt"]
        answer = vlm.generate(sample.image, prompt, max_new_tokens=limit).text
        reference = self.reference(sample, answer)
        first = {"target": "", "layers": "", "reference": reference, "said": answer}
        found = [first | self.judged(reference, answer)]
        for target in TARGETS:
            for layers in configurations(len(vlm.text.layers), self.bands):
                rule = Knockout("image_block", _TEXT[target], layers)
                said = vlm.generate(sample.image, prompt, knockout=rule, max_new_tokens=limit).text
                found.append({"target": target, "layers": layers, "said": said, **self.judged(reference, said)})
        return found

    def findings(self, rows: dict[str, list[Row]]) -> Report:
        found = {
            (row["target"], row["layers"]): means_of([one[i] for one in rows.values()])
            for i, row in enumerate(next(iter(rows.values())))
        }
        everywhere = {target: found[target, "from 0"]["f1"][0] for target in TARGETS}
        bands = list(dict.fromkeys(layers for _, layers in found if layers.startswith("except")))
        open_in = [f"{band}, {found['query+generated', band]['f1'][0]:.2f}" for band in bands]
        says = [
            f"Objects that the model names, against {self.compared}, over {len(rows)} images. With the image closed to"
            f" the generated tokens in all layers F1 is {everywhere['generated']:.2f}, closed to the query"
            f" {everywhere['query']:.2f}, closed to both {everywhere['query+generated']:.2f}; closed to both in all"
            f" layers {'; '.join(open_in)}.",
        ]
        asides, counts = self.asides(row for one in rows.values() for row in one)
        says += asides
        table = Table(
            "Objects named with image -> target knocked out, mean over images ± standard error",
            ["image -> target", "layers", *FIGURES],
            [
                [target or "nothing", layers or "-", *(cell_of(means[figure]) for figure in FIGURES)]
                for (target, layers), means in found.items()
            ],
        )
        name, one = next(iter(rows.items()))
        said = Table(
            f"What is said of {name}",
            ["image -> target", "layers", "answer"],
            [
                [row["target"] or "nothing", row["layers"] or "-", row["said"] or "(nothing)"]
                for row in one
                if row["layers"] in ("", "from 0", *bands)
            ],
        )
        means = [{"target": target, "layers": layers, **finite(one)} for (target, layers), one in found.items()]
        figures = {"samples": len(rows), **counts, "means": means}
        labels = labels_csv(
            (one[0]["reference"], row["said"], row["labels"]) for one in rows.values() for row in one if "labels" in row
        )
        charts, files = _charts(found, bands), {"labels.csv": labels}
        return Report(self.name, self.title, says, [table, said], charts, figures, files=files)


def _charts(found: dict[tuple[str, str], dict], bands: Sequence[str]) -> list[Chart]:
    return [
        Chart(
            "knockout-sweep",
            lambda figure: _draw(figure, found, bands),
            "F1 of the named objects when the image is closed to the query, to the generated tokens or to both from a"
            " layer on; on the right in all layers but a band. Bars are standard errors.",
        ),
        Chart(
            "knockout-bars",
            lambda figure: _draw_bars(figure, found, bands),
            "F1 of the named objects with the image closed in all layers, and (dashed) in all but a band. Bars are"
            " standard errors.",
        ),
    ]


def middle_half(num_layers: int) -> tuple[int, int]:
    """Return the first and the last of the middle half of a model's layers."""
    half = max(1, num_layers // 2)
    first = (num_layers - half) // 2
    return first, first + half - 1


def configurations(num_layers: int, bands: Sequence[str] = ()) -> list[str]:
    """Return the layers to knock out: from each of up to 16 starting layers on, and all except each band."""
    starts = range(0, num_layers, -(-num_layers // _STARTS))
    first, last = middle_half(num_layers)
    bands = bands or [_BANDS.get(num_layers, f"{first}-{last}")]
    return [*(f"from {start}" for start in starts), *(f"except {band}" for band in bands)]


def _draw(figure: Any, found: dict[tuple[str, str], dict], bands: Sequence[str]) -> None:
    axes = figure.subplots()
    starts = [int(layers.split()[1]) for target, layers in found if target == TARGETS[0] and layers.startswith("from")]
    gap = max(1.5, 0.12 * len(starts))
    asides = [starts[-1] + gap * (i + 1) for i in range(len(bands))]
    for i, (target, color) in enumerate(zip(TARGETS, COLORS, strict=False)):
        mark, style = _LOOKS[target]
        shift = 0.01 * (i - 1) * asides[-1]  # shows equal values side by side
        means, errors = zip(*(found[target, f"from {start}"]["f1"] for start in starts), strict=True)
        axes.errorbar(
            [s + shift for s in starts],
            means,
            errors,
            color=color,
            marker=mark,
            linestyle=style,
            capsize=2,
            label=target,
        )
        for aside, band in zip(asides, bands, strict=True):
            mean, error = found[target, band]["f1"]
            axes.errorbar([aside + shift], [mean], [error], color=color, marker=mark, capsize=2)
    axes.set_xticks([*starts, *asides], [*map(str, starts), *(f"all but\n{band.split()[1]}" for band in bands)])
    axes.axvline((starts[-1] + asides[0]) / 2, color="#bbbbbb", linewidth=1)
    axes.set_xlabel("knocked out from this layer on")
    axes.set_ylabel("F1 of the named objects")
    axes.set_ylim(-0.03, 1.03)
    axes.grid(alpha=0.25)
    axes.legend(title="image closed to", loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)


def _draw_bars(figure: Any, found: dict[tuple[str, str], dict], bands: Sequence[str]) -> None:
    axes = figure.subplots()
    ways = ["from 0", *bands]
    width = 0.8 / len(ways)
    for i, way in enumerate(ways):
        at = np.arange(len(TARGETS)) + (i - (len(ways) - 1) / 2) * width
        means, errors = zip(*(found[target, way]["f1"] for target in TARGETS), strict=True)
        axes.bar(
            at,
            means,
            0.9 * width,
            yerr=errors,
            capsize=3,
            color=COLORS[i % len(COLORS)],
            alpha=0.8 if i == 0 else 0.35,
            edgecolor="#333333",
            linestyle="-" if i == 0 else "--",
            label="all layers" if i == 0 else f"all but {way.split()[1]}",
        )
    axes.set_xticks(range(len(TARGETS)), [f"image -> {target}" for target in TARGETS])
    axes.set_ylabel("F1 of the named objects")
    axes.set_ylim(0, 1.03)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(title="knocked out in", loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
