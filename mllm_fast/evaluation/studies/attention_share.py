"""Measure where generated tokens look, layer by layer (arXiv 2411.17491, figures 1 and A5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ...knockout.attention_share import PAPER_TYPES, TYPES
from ..base import Evaluation, EvaluationOptions
from ..registry import evaluation
from ..report import COLORS, Chart, Report, Table
from ..rows import Row
from ..samples import Sample

if TYPE_CHECKING:
    from ...vlm import VLM

_MARKS = {
    "system": "s",
    "image": "o",
    "image_block": "o",
    "image_separator": "x",
    "query": "^",
    "text": "^",
    "generated": "D",
}
_COLORS = {
    "image_block": COLORS[0],
    "text": COLORS[1],
    "system": "#777777",
    "image": COLORS[0],
    "image_separator": COLORS[3],
    "query": COLORS[1],
    "generated": COLORS[2],
}


@evaluation
class AttentionShare(Evaluation):
    """An evaluation of the attention that each type of token gets.

    An image has one row for each layer, with the mean over heads and generated tokens. The shares of a layer sum to 1.

    Args:
        prompt: The prompt for the description.
        max_new_tokens: The largest number of tokens in the description.
        apart: Whether the system's tokens, and the marks at and in an image, have shares of their own. Otherwise the
            types are the paper's: the image's block, the text (all else of the prompt) and the generated tokens.
    """

    name: ClassVar[str] = "attention-share"
    title: ClassVar[str] = "Where the generated tokens look"

    @classmethod
    def from_options(cls, options: EvaluationOptions) -> Evaluation:
        return cls(options.prompt, options.answer_tokens, options.apart)

    def __init__(self, prompt: str = "Describe the image.", max_new_tokens: int = 64, apart: bool = False):
        self.settings: dict[str, Any] = {"prompt": prompt, "max_new_tokens": max_new_tokens, "apart": apart}

    def rows(self, vlm: VLM, sample: Sample) -> list[Row]:
        limit = self.settings["max_new_tokens"]
        what = True if self.settings["apart"] else "paper"
        said = vlm.generate(sample.image, self.settings["prompt"], attention_share=what, max_new_tokens=limit)
        if said.attention_share is None:  # the answer ended at once, so no generated token was read
            return []
        shares = {name: share.mean(1).tolist() for name, share in said.attention_share.items()}
        layers = range(len(shares["generated"]))
        return [{"layer": layer, **{name: share[layer] for name, share in shares.items()}} for layer in layers]

    def findings(self, rows: dict[str, list[Row]]) -> Report:
        samples = [one for one in rows.values() if one]
        if not samples:
            return self.nothing("No sample gave an answer.")
        # [type][sample, layer]
        types = [name for name in (*PAPER_TYPES[:2], *TYPES) if name in samples[0][0]]
        seen = "image" if self.settings["apart"] else "image_block"
        shares = {name: np.array([[row[name] for row in one] for one in samples]) for name in types}
        spread = {name: np.percentile(array, (25, 50, 75), axis=0) for name, array in shares.items()}
        image = spread[seen][1]
        top = int(image.argmax())
        says = [
            f"Median over {len(samples)} images. The image gets most attention in layer {top} ({image[top]:.0%} of"
            f" it) and least in layer {int(image.argmin())} ({image.min():.0%})."
        ]
        if len(samples) < len(rows):
            says.append(f"{len(rows) - len(samples)} images were answered with nothing, and are left out.")
        table = Table(
            "Share of the generated tokens' attention, median (quartiles), %",
            ["layer", *types],
            [[str(layer), *(_cell(spread[name][:, layer]) for name in types)] for layer in range(len(image))],
        )
        figures = {
            "samples": len(samples),
            "quartiles": {name: [list(map(float, q)) for q in spread[name]] for name in types},
        }
        chart = Chart(
            "attention-share",
            lambda figure: _draw(figure, spread),
            "Share of the generated tokens' attention over layers, by type of token; bands span the quartiles of the"
            " images.",
        )
        return Report(self.name, self.title, says, [table], [chart], figures)


def _cell(quartiles: np.ndarray) -> str:
    low, middle, high = 100 * quartiles
    return f"{middle:.1f} ({low:.1f}-{high:.1f})"


def _draw(figure: Any, spread: dict[str, np.ndarray]) -> None:
    axes = figure.subplots()
    layers = np.arange(spread["generated"].shape[1])
    for name, (low, middle, high) in spread.items():
        axes.fill_between(layers, 100 * low, 100 * high, color=_COLORS[name], alpha=0.15, linewidth=0)
        axes.plot(layers, 100 * middle, color=_COLORS[name], marker=_MARKS[name], label=name.replace("_", " "))
    axes.set_xlabel("layer")
    axes.set_ylabel("share of attention (%)")
    axes.set_ylim(0, 100)
    axes.set_xticks(layers[:: max(1, len(layers) // 16)])
    axes.grid(alpha=0.25)
    axes.legend(title="attention to", loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
