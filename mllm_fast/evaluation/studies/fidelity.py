"""Compare all methods of `Explanation.heatmap` on the same words.

The measures are pointing, deletion and insertion curves (arXiv 1806.07421, with knockouts in place of grey pixels),
agreement with the exhaustive causal explanation, time and memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from ...explain.registry import HEATMAP_METHODS, methods_without_detector
from ...explain.verify import log_probs
from ..base import Evaluation, EvaluationOptions, mean_and_error
from ..memory import peak_tensor_bytes
from ..registry import evaluation
from ..report import COLORS, Chart, Report, Table, cell
from ..rows import Row
from ..samples import Sample
from .word_alignment import WordEvaluation

if TYPE_CHECKING:
    from ...explain.explanation import Explanation
    from ...vlm import VLM

SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
_YARDSTICK = "exhaustive"
_MARKS = "os^vDPX*"
_LOOKS = (*COLORS[:6], "#999999", "#000000")


@evaluation
class Fidelity(WordEvaluation):
    """An evaluation that compares the heatmap methods.

    There is one row for each word that names an object of the image, and each method. A row has these fields:

    - "hit": whether the peak of the heatmap lies within `near` tokens of the object's mask.
    - "deletion": p(word) with the highest patches knocked out (image -> query and generated, in all layers), for each
      of SHARES.
    - "insertion": p(word) with all other patches knocked out, for each of SHARES.
    - "rank": the rank correlation (Spearman) with the exhaustive attribution, or None if either is constant.
    - "seconds": the time of one attribution. The forward pass of the answer is recorded before, and no results of
      earlier attributions are kept.
    - "megabytes": the tensors alive at once, for a sample's first word; None for other words.
    """

    name: ClassVar[str] = "fidelity"
    title: ClassVar[str] = "Which map is right?"
    needs_masks: ClassVar[bool] = True

    @classmethod
    def from_options(cls, options: EvaluationOptions) -> Evaluation:
        return cls(options.prompt, options.words, max_new_tokens=options.answer_tokens)

    def __init__(self, *given: Any, **options: Any):
        super().__init__(*given, **options)
        self.methods = methods_without_detector()
        added = [name for name in HEATMAP_METHODS.added() if name in self.methods]
        if added:
            self.settings = {**self.settings, "added_methods": added}

    def rows(self, vlm: VLM, sample: Sample) -> list[Row]:
        ex, words = self.explained(vlm, sample)
        memory = _megabytes(ex, words[0].token, self.methods) if words else {}
        found: list[Row] = []
        for word in words:
            maps, seconds = {}, {}
            for method in self.methods:
                ex.forget()
                start = time.perf_counter()
                maps[method] = ex.attribution(word.token, method)
                seconds[method] = time.perf_counter() - start
            deletion, insertion = curves(ex, word.token, maps)
            for method, values in maps.items():
                grid = ex.layout.images[0].to_grid(values)
                found.append(
                    {
                        "thing": word.name,
                        "token": word.token,
                        "method": method,
                        "hit": bool(word.hits.flat[int(grid.argmax())]),
                        "deletion": deletion[method],
                        "insertion": insertion[method],
                        "rank": rank_correlation(values.numpy(), maps[_YARDSTICK].numpy()),
                        "seconds": seconds[method],
                        "megabytes": memory[method] if word is words[0] else None,
                    }
                )
        return found

    def findings(self, rows: dict[str, list[Row]]) -> Report:
        every = [row for one in rows.values() for row in one]
        if not every:
            return self.nothing("No word named an object of its image.")
        by = {method: [row for row in every if row["method"] == method] for method in self.methods}
        found = {method: _summary(of) for method, of in by.items()}
        hit = {method: found[method]["hit"] for method in self.methods}
        ours, mean, best = hit["logprob"], hit["attention"], min(self.methods, key=lambda m: found[m]["deletion"][0])
        says = [
            f"{len(by['logprob'])} words that name an object, of {len(rows)} images. The peak of the log-probability"
            f" map lies at the word's object in {ours[0]:.1%}, that of mean attention in {mean[0]:.1%}. With more and"
            " more of a map's highest patches knocked out the word's mean probability is"
            f" {found['logprob']['deletion'][0]:.2f} by the log-probability map,"
            f" {found['attention']['deletion'][0]:.2f} by mean attention and {found['random']['deletion'][0]:.2f} by"
            f" chance; it is lowest by {best}.",
            "Deletion: that probability, lower is better. Insertion: with all other patches knocked out, higher is"
            f" better. The rank correlation is with {_YARDSTICK}, each patch knocked out in turn: small where patches"
            " stand in for each other, so that no single one matters.",
        ]
        table = Table(
            "Every way to draw a map, mean ± standard error over words; time and memory of one map",
            ["method", "peak at object, %", "deletion", "insertion", "rank", "ms", "MB"],
            [
                [
                    method,
                    cell(one["hit"], 1, 100),
                    cell(one["deletion"], 3),
                    cell(one["insertion"], 3),
                    cell(one["rank"]),
                    f"{1e3 * one['seconds']:.1f}",
                    f"{one['megabytes']:.2f}",
                ]
                for method, one in found.items()
            ],
            "ms: median, of an answer whose pass is recorded, with nothing kept of maps before. MB: tensors alive at"
            " once, median.",
        )
        charts = [
            Chart(
                "fidelity",
                lambda figure: _draw(figure, by),
                "Probability of the word over the share of patches, taken by each map from its highest down: knocked"
                " out (left, the sooner it falls the better), or the only ones left (right, the sooner it rises the"
                " better).",
                (10.5, 4.6),
            )
        ]
        return Report(self.name, self.title, says, [table], charts, {"words": len(by["logprob"]), "methods": found})


def curves(ex: Explanation, token: int, maps: dict[str, Tensor]) -> tuple[dict[str, list[float]], ...]:
    """Return the deletion and insertion curves of each method.

    Patches are taken from the highest attribution down, with ties in order of position.

    Args:
        ex: The explanation.
        token: The index of the generated token.
        maps: The attribution of each method, [tokens of the image].

    Returns:
        Two dictionaries from each method to p(token) at each of SHARES. In the first the patches are knocked out; in
        the second they are the only ones left.
    """
    positions = ex.layout.images[0].positions
    orders = {method: positions[values.argsort(descending=True, stable=True)] for method, values in maps.items()}
    inner = [math.ceil(share * len(positions)) for share in SHARES[1:-1]]
    variants = [positions[:0], positions]
    for order in orders.values():
        variants += [order[:count] for count in inner] + [order[count:] for count in inner]
    whole, none, *rest = log_probs(ex, token, variants).exp().tolist()
    deletion, insertion = {}, {}
    for i, method in enumerate(orders):
        part = rest[2 * i * len(inner) : 2 * (i + 1) * len(inner)]
        deletion[method] = [whole, *part[: len(inner)], none]
        insertion[method] = [none, *part[len(inner) :], whole]
    return deletion, insertion


def _megabytes(ex: Explanation, token: int, methods: Sequence[str]) -> dict[str, float]:
    found = {}
    for method in methods:
        ex.forget()
        found[method] = peak_tensor_bytes(partial(ex.attribution, token, method)) / 1e6
    return found


def area(curve: list[float]) -> float:
    """Return the mean of a curve over SHARES, by the trapezoidal rule."""
    return float(np.diff(SHARES) @ (np.array(curve[1:]) + np.array(curve[:-1])) / 2)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Return Spearman's rank correlation, or None if one array is constant. Ties get their mean rank."""
    left, right = _ranks(a), _ranks(b)
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return None
    return float(np.corrcoef(left, right)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _summary(rows: list[Row]) -> dict[str, Any]:
    """Return (mean, standard error) of each measure of one method, and the medians of time and memory."""
    return {
        "hit": mean_and_error([row["hit"] for row in rows]),
        "deletion": mean_and_error([area(row["deletion"]) for row in rows]),
        "insertion": mean_and_error([area(row["insertion"]) for row in rows]),
        "rank": mean_and_error([row["rank"] for row in rows if row["rank"] is not None]),
        "seconds": float(np.median([row["seconds"] for row in rows])),
        "megabytes": float(np.median([row["megabytes"] for row in rows if row["megabytes"] is not None])),
    }


def _draw(figure: Any, by: dict[str, list[Row]]) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, measure, title in ((left, "deletion", "knocked out"), (right, "insertion", "left")):
        for i, (method, rows) in enumerate(by.items()):
            axes.plot(
                [100 * share for share in SHARES],
                np.mean([row[measure] for row in rows], 0),
                color=_LOOKS[i % len(_LOOKS)],
                marker=_MARKS[i % len(_MARKS)],
                markersize=5,
                linestyle="-" if method == "logprob" else "--",
                label=method,
            )
        axes.set_xlabel(f"patches {title} (%)")
        axes.set_ylim(-0.02, 1.02)
        axes.grid(alpha=0.25)
    left.set_ylabel("probability of the word")
    right.legend(loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0)
