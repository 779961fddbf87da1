"""Show where in the image generated tokens look, layer by layer (arXiv 2411.17491, figures 4 and 8)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ...context.compress import prefill_and_score
from ..base import Evaluation, EvaluationOptions, mean_and_error
from ..registry import evaluation
from ..report import Chart, Report, Table, cell
from ..rows import Row
from ..samples import Sample

if TYPE_CHECKING:
    from ...vlm import VLM

EDGES = np.logspace(-7, 0, 36)  # five bins for each power of ten
TOP = 0.05  # the share of the image tokens whose attention is summed
_PANELS, _ACROSS = 32, 8
_MEASURES = {"image": "attention to the image, %", "top": "of it to the top 5 %, %", "gini": "Gini coefficient"}
_TIMES = {"image": 100.0, "top": 100.0, "gini": 1.0}


@evaluation
class AttentionMaps(Evaluation):
    """An evaluation of the attention of generated tokens to each image token, a mean over tokens and heads.

    An image has one row for each layer:

    - "map": the attention to the tokens of the first image, on its grid.
    - "counts": how many image tokens have an attention in each bin of `EDGES`; smaller ones are in the first bin.
    - "top": the share of the image's attention that the 5 % of its tokens with the most attention get.
    - "gini": the Gini coefficient of the image tokens' attention, 0 if all get the same, near 1 if one gets all.

    Args:
        prompt: The prompt for the description.
        max_new_tokens: The largest number of tokens in the description.
    """

    name: ClassVar[str] = "attention-maps"
    title: ClassVar[str] = "Where in the image the generated tokens look"

    @classmethod
    def from_options(cls, options: EvaluationOptions) -> Evaluation:
        return cls(options.prompt, options.answer_tokens)

    def __init__(self, prompt: str = "Describe the image.", max_new_tokens: int = 64):
        self.settings: dict[str, Any] = {"prompt": prompt, "max_new_tokens": max_new_tokens}

    def rows(self, vlm: VLM, sample: Sample) -> list[Row]:
        limit = self.settings["max_new_tokens"]
        prefill = prefill_and_score(vlm, sample.image, self.settings["prompt"], ["generated"], max_new_tokens=limit)
        masses, image = prefill.masses["generated"], prefill.layout.images[0]
        tokens = prefill.layout.positions("image")
        return [
            {
                "layer": layer,
                "map": image.to_grid(mass[image.positions]).numpy().astype(float).round(8).tolist(),
                **measures(mass[tokens].double().numpy()),
            }
            for layer, mass in zip(vlm.text.site_layers, masses, strict=True)
        ]

    def findings(self, rows: dict[str, list[Row]]) -> Report:
        layers = [row["layer"] for row in next(iter(rows.values()))]
        each = {name: [[one[i][name] for one in rows.values()] for i in range(len(layers))] for name in _MEASURES}
        found = {name: [mean_and_error(values) for values in layer] for name, layer in each.items()}
        counts = np.array([[one[i]["counts"] for one in rows.values()] for i in range(len(layers))]).sum(1)
        top = [mean for mean, _ in found["top"]]
        most = int(np.argmax(top))
        says = [
            f"{len(rows)} images. {TOP:.0%} of the image tokens get {top[most]:.0%} of the image's attention in layer"
            f" {layers[most]} and {min(top):.0%} in layer {layers[int(np.argmin(top))]};"
            f" {float(np.mean(top)):.0%} on average over the layers."
        ]
        table = Table(
            "How the attention is spread over the image tokens, mean ± standard error over images",
            ["layer", *_MEASURES.values()],
            [
                [str(layer), *(cell(found[name][i], 2 if name == "gini" else 1, _TIMES[name]) for name in _MEASURES)]
                for i, layer in enumerate(layers)
            ],
        )
        name, one = next(iter(rows.items()))
        shown = one[:: max(1, math.ceil(len(one) / _PANELS))]
        charts = [
            Chart(
                "attention-maps",
                lambda figure: _draw_maps(figure, shown),
                f"The attention of the generated tokens to the tokens of {name}, layer by layer, each from 0 to its own"
                " largest.",
                (8.5, 1.4 * -(-len(shown) // _ACROSS) + 0.2),
            ),
            Chart(
                "attention-histogram",
                lambda figure: _draw_histogram(figure, layers, counts),
                "How many image tokens get how much attention, in each layer, over all images. Both scales are"
                " logarithmic: few tokens get much.",
            ),
        ]
        figures = {
            "samples": len(rows),
            "layers": layers,
            **{name: [mean for mean, _ in values] for name, values in found.items()},
            "edges": EDGES.tolist(),
            "counts": counts.tolist(),
        }
        return Report(self.name, self.title, says, [table], charts, figures)


def measures(values: np.ndarray) -> dict[str, Any]:
    """Return how attention is spread over image tokens; see `AttentionMaps`.

    Args:
        values: The attention to each image token, [tokens].
    """
    ordered = np.sort(values)
    total, count = float(values.sum()), len(values)
    most = max(1, math.ceil(round(TOP * count, 9)))
    ranks = np.arange(1, count + 1)
    gini = float((2 * ranks - count - 1) @ ordered / (count * total)) if total > 0 else 0.0
    counts, _ = np.histogram(np.clip(values, EDGES[0], EDGES[-1]), EDGES)
    return {
        "image": total,
        "top": float(ordered[-most:].sum() / total) if total > 0 else 0.0,
        "gini": gini,
        "counts": counts.tolist(),
    }


def _draw_maps(figure: Any, rows: list[Row]) -> None:
    across = min(_ACROSS, len(rows))
    panels = list(figure.subplots(-(-len(rows) // across), across, squeeze=False).flat)
    for axes in panels:
        axes.axis("off")
    for axes, row in zip(panels, rows, strict=False):
        values = np.array(row["map"])
        axes.imshow(values, cmap="magma", vmin=0, vmax=max(values.max(), 1e-12))
        axes.set_title(f"layer {row['layer']}", fontsize=8)


def _draw_histogram(figure: Any, layers: list[int], counts: np.ndarray) -> None:
    axes = figure.subplots()
    image = axes.pcolormesh(
        EDGES,
        np.arange(len(layers) + 1) - 0.5,
        np.where(counts, counts, np.nan),
        cmap="viridis",
        norm="log",
    )
    filled = np.flatnonzero(counts.sum(0))
    axes.set_xscale("log")
    axes.set_xlim(EDGES[filled[0]], EDGES[filled[-1] + 1])
    axes.set_xlabel("attention to an image token")
    axes.set_ylabel("layer")
    step = max(1, len(layers) // 16)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    figure.colorbar(image, ax=axes, label="image tokens")
