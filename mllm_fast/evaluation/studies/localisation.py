"""Measure whether the words for an object look at it (arXiv 2411.17491, section 4.5, figures 6, 7 and A6).

The peak of the attention of the words' tokens, layer by layer, is compared with the object's mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from ...core.errors import InputError, check_choice
from ...knockout.rule import Knockout
from ..base import Evaluation, EvaluationOptions, mean_and_error
from ..judges.judge import Judge, NounJudge, Unjudged, shapes_judge
from ..registry import evaluation
from ..report import COLORS, Chart, Report, Table, cell
from ..rows import Row
from ..samples import Sample
from .knockout_sweep import middle_half
from .word_alignment import cells, cells_within, phrase_tokens

if TYPE_CHECKING:
    from ...explain.explanation import Explanation
    from ...runtime.answer import Answer
    from ...vlm import VLM
    from ..segmenter import Segmenter

OBJECTS = ("lost", "all")
_WIDTHS = {80: 10, 32: 4}  # the paper's bands of layers, by the number of layers of its two models
_MAP_LAYERS = {80: (20, 40), 32: (16, 24)}  # the layers of its figures 6, A9 and A10, both included
_SHOWN, _ACROSS = 8, 4  # maps in the report, and in a line of it
_FINE = 20


@evaluation
class Localisation(Evaluation):
    """An evaluation of whether the attention of an object's words peaks at the object.

    An object of the description has one row. Its words are all tokens of its phrase, and the attention of a token is
    that of its own row, averaged over the tokens and the heads. The peak is a hit if the centre of its image token lies
    at most `near` tokens from the object's mask. The mask covers all objects of that name.

    - "layers": whether the peak of each layer is a hit.
    - "map", "all": the same for the mean over the layers of the paper's maps (20-40 of 80, 16-24 of 32, else the middle
      half), and over all layers.
    - "logprob": the same for the log-probability increase of the ten best heads, averaged over the tokens.
    - "chance": the share of the image tokens that would be hits.

    An object without words in the description, or without a mask, has a row that says so and does not count.

    Args:
        prompt: The prompt for the description.
        judge: The judge of the objects. None stands for that of the generated scenes.
        objects: "lost": the objects that the model no longer names when the image is closed to the generated tokens in
            all layers, as in the paper. "all": every object of the description.
        near: The distance from the mask, in tokens.
        max_new_tokens: The largest number of tokens in a description.
        segmenter: A model that finds the masks by the objects' names; None takes the masks that are known.
    """

    name: ClassVar[str] = "localisation"
    title: ClassVar[str] = "Does a word look at its object?"
    needs_masks: ClassVar[bool] = True

    @classmethod
    def from_options(cls, options: EvaluationOptions) -> Evaluation:
        return cls(
            options.prompt,
            options.judge or options.words,
            options.objects,
            max_new_tokens=options.answer_tokens,
            segmenter=options.segmenter,
        )

    def __init__(
        self,
        prompt: str = "Describe the image.",
        judge: Judge | None = None,
        objects: str = "lost",
        near: float = 1.0,
        max_new_tokens: int = 64,
        segmenter: Segmenter | None = None,
    ):
        check_choice("objects", objects, OBJECTS)
        if near < 0:
            raise InputError(f"near is a number of tokens, 0 or more, got {near}")
        self.judge, self.segmenter = judge or shapes_judge(), segmenter
        self.settings: dict[str, Any] = {
            "prompt": prompt,
            "judge": self.judge.settings,
            "objects": objects,
            "near": near,
            "max_new_tokens": max_new_tokens,
            "segmenter": None if segmenter is None else segmenter.name,
        }

    def rows(self, vlm: VLM, sample: Sample) -> list[Row]:
        if sample.things is None and self.segmenter is None:
            raise InputError(f"{sample.name}: no masks are known of its objects")
        prompt, limit = self.settings["prompt"], self.settings["max_new_tokens"]
        answer = vlm.generate(sample.image, prompt, max_new_tokens=limit)
        closed = Knockout("image_block", "generated")
        knocked = vlm.generate(sample.image, prompt, knockout=closed, max_new_tokens=limit).text
        try:
            found = self.judge.compare(answer.text, knocked)
        except Unjudged as error:
            return [{"unjudged": str(error), "tokens": error.tokens}]
        names = dict.fromkeys(found.missed if self.settings["objects"] == "lost" else found.reference)
        if not names:
            return []
        # one more token, so that the last one of the answer has a row of its own
        ex = vlm.explain(sample.image, prompt, [*answer.token_ids, answer.token_ids[0]])
        rows = [self._row(ex, answer, sample, name) for name in names]
        return [row | {"tokens": found.tokens if i == 0 else 0} for i, row in enumerate(rows)]

    def _row(self, ex: Explanation, answer: Answer, sample: Sample, name: str) -> Row:
        words = self.judge if isinstance(self.judge, NounJudge) else None
        tokens = phrase_tokens(answer.tokens, name, words)
        head = {}
        if not tokens and len(name.split()) > 1:  # a judge may call an object otherwise than the description
            tokens, head = phrase_tokens(answer.tokens, name.split()[-1], None), {"by_last_word": True}
        if not tokens:
            return {"thing": name, "skipped": "no words in the description"}
        if self.segmenter is not None:
            mask = self.segmenter.mask(ex.images[0], name)
        else:
            masks = [thing.mask for thing in sample.things or () if thing.name == name]
            mask = np.any(masks, 0) if masks else np.zeros(ex.images[0].size[::-1], bool)
        layout = ex.layout.images[0]
        inside = cells(mask, layout)
        if not inside.any():
            return {"thing": name, "skipped": "no mask"}
        hits = cells_within(mask, layout, self.settings["near"])
        each = [ex.attention(token + 1).mean(1)[:, layout.positions] for token in tokens]
        attention = torch.stack(each).mean(0)  # [layers, image tokens]
        first, last = map_layers(len(attention))
        at = lambda values: bool(hits.flat[int(layout.to_grid(values).argmax())])  # noqa: E731
        shown = layout.to_grid(attention[first : last + 1].mean(0))
        gain = torch.stack([ex.attribution(token) for token in tokens]).mean(0)
        return {
            "thing": name,
            **head,
            "words": [answer.tokens[token] for token in tokens],
            "layers": [at(values) for values in attention],
            "map": at(attention[first : last + 1].mean(0)),
            "all": at(attention.mean(0)),
            "logprob": at(gain),
            "chance": float(hits.mean()),
            "shown": (shown / shown.max()).round(decimals=3).tolist(),
            "mask": inside.tolist(),
        }

    def findings(self, rows: dict[str, list[Row]]) -> Report:
        every = [row for one in rows.values() for row in one]
        found = [row for row in every if "layers" in row]
        asides = _asides(every)
        if not found:
            return self.nothing(" ".join(["No words of an object with a mask were found.", *asides]))
        layers = [mean_and_error([row["layers"][i] for row in found]) for i in range(len(found[0]["layers"]))]
        bands = band_means([mean for mean, _ in layers])
        maps = {name: mean_and_error([row[name] for row in found]) for name in ("map", "all", "logprob")}
        chance = float(np.mean([row["chance"] for row in found]))
        best = max(bands, key=lambda band: bands[band])
        first, last = map_layers(len(layers))
        which = "that are lost when the image is closed to the generated tokens" if self._lost else "of descriptions"
        images = sum(any("layers" in row for row in one) for one in rows.values())
        near = f"{self.settings['near']:g} token"
        says = [
            f"{len(found)} objects {which}, in {images} of {len(rows)} images. The attention of an object's words peaks"
            f" within {near} of it in {bands[best]:.1%} in the best band ({best}) of layers, and in"
            f" {maps['map'][0]:.1%} where the maps of the layers {first}-{last} are averaged; the words'"
            f" log-probability map in {maps['logprob'][0]:.1%}. Chance is {chance:.1%}.",
            *asides,
        ]
        table = Table(
            f"Peak within {near} of the object's mask, %",
            ["map", "at the object"],
            [
                *([f"attention, mean of layers {band}", f"{100 * bands[band]:.1f}"] for band in bands if "-" in band),
                [f"attention, averaged over layers {first}-{last}", cell(maps["map"], 1, 100)],
                ["attention, averaged over all layers", cell(maps["all"], 1, 100)],
                ["log-probability increase", cell(maps["logprob"], 1, 100)],
                *([f"attention, layer {i}", cell(value, 1, 100)] for i, value in enumerate(layers)),
                ["chance", f"{100 * chance:.1f}"],
            ],
            "± standard error over objects.",
        )
        figures = {
            "objects": len(found),
            "skipped": sum("skipped" in row for row in every),
            "chance": chance,
            "layers": [mean for mean, _ in layers],
            "bands": bands,
            **{name: value[0] for name, value in maps.items()},
        }
        charts = [
            Chart(
                "localisation",
                lambda figure: _draw(figure, layers, bands, maps["logprob"], chance),
                "How often the attention of an object's words peaks at it: each layer, and (bars) the mean over bands"
                " of consecutive layers; beside it the words' log-probability map, and chance.",
            ),
            Chart(
                "localisation-maps",
                lambda figure: _draw_maps(figure, found[:_SHOWN]),
                f"The attention of an object's words over the image tokens, averaged over the layers {first}-{last}. A"
                " white cross marks the peak, a white line the tokens of the object's mask.",
                (8.5, 2.4 * -(-min(_SHOWN, len(found)) // _ACROSS)),
            ),
        ]
        return Report(self.name, self.title, says, [table], charts, figures)

    @property
    def _lost(self) -> bool:
        return self.settings["objects"] == "lost"


def map_layers(num_layers: int) -> tuple[int, int]:
    """Return the first and the last layer of the averaged maps: the paper's, or the middle half."""
    return _MAP_LAYERS.get(num_layers, middle_half(num_layers))


def band_means(accuracies: list[float]) -> dict[str, float]:
    """Return the mean accuracy of consecutive layers: 10 of 80, 4 of 32, else an eighth; the last may be fewer."""
    count = len(accuracies)
    width = _WIDTHS.get(count, max(1, round(count / 8)))
    parts = {start: accuracies[start : start + width] for start in range(0, count, width)}
    name = lambda start, part: f"{start}-{start + len(part) - 1}" if len(part) > 1 else str(start)  # noqa: E731
    return {name(start, part): float(np.mean(part)) for start, part in parts.items()}


def _asides(rows: list[Row]) -> list[str]:
    """Return sentences about what does not count."""
    says = []
    for why in dict.fromkeys(row["skipped"] for row in rows if "skipped" in row):
        says.append(f"{sum(row.get('skipped') == why for row in rows)} objects have {why} and are left out.")
    heads = sum(row.get("by_last_word", False) for row in rows)
    if heads:
        says.append(f"{heads} objects are found in their description by the last word of their name alone.")
    unjudged = [row["unjudged"] for row in rows if "unjudged" in row]
    if unjudged:
        says.append(f"{len(unjudged)} descriptions are unjudged and left out: {unjudged[0]}.")
    return says


def _draw(figure: Any, layers: list, bands: dict[str, float], logprob: tuple[float, float], chance: float) -> None:
    axes = figure.subplots()
    starts = [int(band.split("-")[0]) for band in bands]
    widths = np.diff([*starts, len(layers)])
    axes.bar(
        np.array(starts) - 0.5,
        [100 * value for value in bands.values()],
        widths,
        align="edge",
        color=COLORS[5],
        edgecolor="white",
        label="mean of a band",
    )
    means, errors = (100 * np.array(values) for values in zip(*layers, strict=True))
    numbers = np.arange(len(layers))
    axes.errorbar(
        numbers, means, errors, color=COLORS[1], marker="s", linestyle="--", capsize=2, label="attention of a layer"
    )
    axes.axhline(100 * logprob[0], color=COLORS[0], label="log-probability map")
    axes.axhline(100 * chance, color="#777777", linestyle=":", label="chance")
    axes.set_xticks(numbers[:: max(1, len(numbers) // 16)])
    axes.set_xlabel("layer")
    axes.set_ylabel("peak at the object (% of objects)")
    axes.set_ylim(0, 103)
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)


def _draw_maps(figure: Any, rows: list[Row]) -> None:
    lines = -(-len(rows) // _ACROSS)
    panels = list(figure.subplots(lines, _ACROSS, squeeze=False).flat)
    for axes in panels:
        axes.axis("off")
    for axes, row in zip(panels, rows, strict=False):
        values, mask = np.array(row["shown"]), np.pad(np.array(row["mask"], float), 1)
        axes.imshow(values, cmap="magma", vmin=0, vmax=1)
        height, width = mask.shape
        fine = np.kron(mask, np.ones((_FINE, _FINE)))  # so that the line follows the tokens' edges
        at = [(np.arange(size * _FINE) + 0.5) / _FINE - 1.5 for size in (width, height)]
        axes.contour(*at, fine, [0.5], colors="white", linewidths=1)
        down, across = np.unravel_index(int(values.argmax()), values.shape)
        for color, width in (("black", 4), ("white", 2)):
            axes.plot(across, down, marker="x", color=color, markersize=9, markeredgewidth=width)
        axes.set_title(row["thing"], fontsize=9)
        axes.set_xlim(-0.5, values.shape[1] - 0.5)
        axes.set_ylim(values.shape[0] - 0.5, -0.5)
