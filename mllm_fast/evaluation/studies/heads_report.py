"""The report of the evaluation "heads"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..base import mean_and_error
from ..report import COLORS, Chart, Report, Table, cell
from ..rows import Row

ASKED = ("visual", "textual")
_MEASURES = {"reciprocal rank": "mean reciprocal rank", "logit minus": "logit minus"}


def report_of(
    name: str, title: str, rows: Sequence[Row], pictures: int
) -> Report:  # long: one report, sentence by sentence
    """Return the report on all rows of the evaluation; see `Heads`."""
    heads = {asked: importance([row[asked] for row in rows]) for asked in ASKED}
    if "second" in rows[0]:
        heads["second"] = importance([row["second"] for row in rows])
    sizes = [values.size for values in heads.values()]
    pairs = [(a, b) for i, a in enumerate(heads) for b in list(heads)[:i]]
    pairs = [(a, b) for a, b in pairs if heads[a].shape == heads[b].shape]
    # with fewer than 2 k heads, the top k would be nearly all of them
    shared = [(b, a, k, overlap(heads[a], heads[b], k)) for a, b in pairs for k in (10, 20) if 2 * k <= heads[a].size]
    right = {asked: float(np.mean([row["right"][asked] for row in rows])) for asked in ASKED}
    held = {asked: _known([row["held"][asked] for row in rows]) for asked in ASKED}
    area = float(np.mean([row["area"] for row in rows]))
    own, other = (float(np.mean([row["attention"][which] for row in rows])) for which in ("own", "other"))
    read = {
        f"the best heads' writes, {asked} question": _readable([row["writes"][asked] for row in rows])
        for asked in ASKED
    }
    layers = [_readable([row["layers"][i] for row in rows]) for i in range(len(rows[0]["layers"]))]
    embedding = _readable([row["embedding"] for row in rows])
    best = [f"{layer}.{head}" for layer, head in top(heads["visual"], 5)]
    says = [
        f"{len(rows)} objects of {pictures} images. The right word comes first among all that the model might say in"
        f" {right['visual']:.1%} of the visual and {right['textual']:.1%} of the textual questions. The heads that"
        f" matter most for visual questions are {', '.join(best)} (layer.head)."
        f"{''.join(_alike(*one) for one in shared)}",
        f"{_percent(held['visual'])} of the best heads' increase comes from the object's own tokens, {area:.1%} of the"
        f" image; of a textual question's {_percent(held['textual'])} from the word that is the answer. The ten best"
        f" heads give {own:.2f} of their attention to the ten best image tokens, and {other:.2f} when the question"
        " names another object.",
    ]
    named = {**read, "the best image token's input embedding, among word embeddings": embedding}
    named |= {_stage(i, len(layers)): value for i, value in enumerate(layers)}
    tables = [
        Table(
            "How well the right word can be read, mean ± standard error over objects",
            ["from", *_MEASURES.values()],
            [[where, *(cell(value[measure]) for measure in _MEASURES)] for where, value in named.items()],
            "Logit minus: the right word's logit less that of another attribute.",
        ),
        Table(
            "The ten best heads",
            ["rank", *map(_title, heads)],
            [[str(i + 1), *(_head(values, i) for values in heads.values())] for i in range(min(10, *sizes))],
            "layer.head, and its share of the importance of all heads. The importance is the mean log-probability"
            " increase of the right word; heads below 0 have none.",
        ),
        _everywhere(heads),
    ]
    charts = [
        Chart(
            "heads",
            lambda figure: _draw_heads(figure, heads),
            "Importance of every head, the largest being 1, for questions about an image and for the same questions"
            " about a sentence; below 0: it speaks against the right word.",
            (9.0, 4.2),
        ),
        Chart(
            "heads-layers",
            lambda figure: _draw_layers(figure, layers),
            "How well the right word can be read from the residual vector at the image token that matters most, before"
            " each layer and behind the last. Bars are standard errors.",
            (9.0, 3.8),
        ),
    ]
    figures: dict[str, Any] = {
        "objects": len(rows),
        "right": right,
        "importance": {asked: values.tolist() for asked, values in heads.items()},
        "percent": {asked: percents(values).tolist() for asked, values in heads.items()},
        "overlap": [{"of": [a, b], "top": k, "shared": n} for a, b, k, n in shared],
        "held": held,
        "area": area,
        "attention": {"own": own, "other": other},
        "read": {**read, "embedding": embedding, "layers": layers},
    }
    return Report(name, title, says, tables, charts, figures)


def importance(heads: Sequence[Sequence[Sequence[float]]]) -> np.ndarray:
    """Return the mean of [n][L][H] over n, scaled so that its largest value is 1."""
    mean = np.mean(np.asarray(heads, float), 0)
    return mean / mean.max() if mean.max() > 0 else mean


def percents(values: np.ndarray) -> np.ndarray:
    """Return each head's share of the importance [L, H] of all heads in percent; heads below 0 have none."""
    positive = np.maximum(values, 0)
    return 100 * positive / positive.sum() if positive.any() else positive


def _everywhere(heads: dict[str, np.ndarray]) -> Table:
    """Return the shares of the heads that are among the ten best for any question, for every question.

    Heads of models of other sizes are left out.
    """
    first = next(iter(heads.values()))
    same = {asked: values for asked, values in heads.items() if values.shape == first.shape}
    shares = {asked: percents(values) for asked, values in same.items()}
    union = dict.fromkeys(one for values in same.values() for one in top(values, min(10, values.size)))
    rows = []
    for layer, head in union:
        cells = []
        for asked, values in same.items():
            rank = 1 + top(values, values.size).index((layer, head))
            cells.append(f"{shares[asked][layer, head]:.1f} ({rank})")
        rows.append([f"{layer}.{head}", *cells])
    return Table(
        "The ten best heads of each question, in all questions",
        ["layer.head", *map(_title, same)],
        rows,
        "The share of the importance of all heads in percent, and the head's rank.",
    )


def top(values: np.ndarray, k: int) -> list[tuple[int, int]]:
    """Return (layer, head) of the k largest values of [L, H]. Ties keep their order."""
    order = np.argsort(-values, axis=None, kind="stable")[:k]
    return [(int(i) // values.shape[1], int(i) % values.shape[1]) for i in order]


def overlap(a: np.ndarray, b: np.ndarray, k: int) -> int:
    """Return how many of the k best heads are the same in both arrays [L, H]."""
    return len({*top(a, k)} & {*top(b, k)})


def _percent(value: tuple[float, float]) -> str:
    return "an unknown share" if math.isnan(value[0]) else f"{value[0]:.1%}"


def _title(asked: str) -> str:
    return "textual question, second model" if asked == "second" else f"{asked} question"


def _alike(a: str, b: str, k: int, shared: int) -> str:
    return f" The top {k} for the {_title(a)} and for the {_title(b)} share {shared}."


def _head(values: np.ndarray, rank: int) -> str:
    layer, head = top(values, rank + 1)[rank]
    return f"{layer}.{head} ({percents(values)[layer, head]:.1f} %)"


def _known(values: Sequence[float | None]) -> tuple[float, float]:
    return mean_and_error([value for value in values if value is not None])


def _readable(found: Sequence[Row]) -> dict[str, tuple[float, float]]:
    return {measure: mean_and_error([one[measure] for one in found]) for measure in _MEASURES}


def _stage(i: int, count: int) -> str:
    return f"the best image token, {'behind the last layer' if i == count - 1 else f'before layer {i}'}"


def _draw_heads(figure: Any, heads: dict[str, np.ndarray]) -> None:
    panels = figure.subplots(1, len(heads), sharey=True)
    for axes, (asked, values) in zip(panels, heads.items(), strict=True):
        shown = axes.imshow(values, cmap="PuOr_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
        axes.set_title(_title(asked))
        axes.set_xlabel("head")
        for axis, count in ((axes.xaxis, values.shape[1]), (axes.yaxis, values.shape[0])):
            axis.set_ticks(range(0, count, max(1, count // 8)))
    panels[0].set_ylabel("layer")
    figure.colorbar(shown, ax=list(panels), label="importance (largest = 1)", extend="min")


def _draw_layers(figure: Any, layers: Sequence[dict[str, tuple[float, float]]]) -> None:
    panels = figure.subplots(1, 2)
    for axes, color, mark, measure in zip(panels, COLORS, "os", _MEASURES, strict=False):
        means, errors = zip(*(one[measure] for one in layers), strict=True)
        axes.errorbar(range(len(layers)), means, errors, color=color, marker=mark, capsize=2)
        axes.set_xlabel("before layer")
        axes.set_ylabel(_MEASURES[measure])
        axes.set_xticks(range(0, len(layers), max(1, len(layers) // 8)))
        axes.grid(alpha=0.25)
    panels[0].set_ylim(0, 1.03)
    panels[1].axhline(0, color="#777777", linestyle=":")
