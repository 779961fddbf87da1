"""Maps of text: how much each token of the prompt and of the earlier answer raised a word's probability."""

from __future__ import annotations

import html
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.notebook import Displayed
from ..drawing.heatmap import colors
from .registry import Heads
from .scores import Scores

DARK, FAINTEST = 0.6, 0.02  # colours up to the first need light letters; shares up to the second have no colour


@dataclass(frozen=True)
class TextMap(Displayed):
    """What the text before a word contributes to it, beside what the images contribute.

    Attributes:
        token: the explained token, as it is shown.
        positions: the positions of the text tokens that the token could see, int64 [n].
        words: their texts, spaces included.
        segments: the segment of each: "system", "query" or "generated".
        values: the log-probability increase of each, summed over the heads, float32 [n].
        images: the sum over the image tokens.
        heads: the heads.
    """

    token: str
    positions: Tensor
    words: tuple[str, ...]
    segments: tuple[str, ...]
    values: Tensor
    images: float
    heads: Heads

    @property
    def sums(self) -> dict[str, float]:
        """The sum of each segment that has tokens, "image" included."""
        found = {} if not self.images else {"image": self.images}
        for name in dict.fromkeys(self.segments):
            found[name] = float(self.values[[one == name for one in self.segments]].sum())
        return found

    @property
    def note(self) -> str:
        """A sentence that says what the parts explain."""
        parts = ", ".join(f"{name} {value:+.2f}" for name, value in self.sums.items())
        return f"Sums of the increases of log p by each token: {parts}."

    def __repr__(self) -> str:
        best = ", ".join(
            f"{self.words[i].strip()!r} {float(self.values[i]):+.2f}"
            for i in self.values.topk(min(3, len(self.values))).indices.tolist()
        )
        return f"TextMap({self.token!r}: {best})"

    def _repr_html_(self) -> str:
        spans = []
        for word, value, (red, green, blue) in zip(self.words, self.values.tolist(), self.shades(), strict=True):
            letters = "#fff" if self.strength(value) <= DARK else "#1c1c20"
            shown = self.strength(value) > FAINTEST
            style = f"background: rgb({red}, {green}, {blue}); color: {letters}" if shown else ""
            spans.append(f'<span style="{style}" title="{value:+.3f}">{html.escape(word)}</span>')
        text = "".join(spans)
        return f'<p dir="auto" style="white-space: pre-wrap">{text}</p><p>{html.escape(self.note)}</p>'

    def strength(self, value: float) -> float:
        """Return a value as a share of the largest one, at least 0."""
        top = float(self.values.max()) if len(self.values) else 0.0
        return max(0.0, value / top) if top > 0 else 0.0

    def shades(self) -> list[tuple[int, int, int]]:
        """Return the colour of each token, as in the maps of images; those of 0 and below are not drawn."""
        found = colors(np.array([self.strength(value) for value in self.values.tolist()]))
        return [(int(red), int(green), int(blue)) for red, green, blue in np.rint(found)]


def text_map(scores: Scores, token: int, heads: Heads) -> TextMap:
    """See `Explanation.text_map`."""
    values = scores.position_scores(token, heads).sum(0)
    places = text_positions(scores, token)
    names: dict[int, str] = {}
    for name in _text_segments(scores):
        names |= dict.fromkeys(scores.layout.positions(name).tolist(), name)
    return TextMap(
        scores.labels[token],
        places,
        tuple(words_at(scores, places)),
        tuple(names[place] for place in places.tolist()),
        values[places],
        float(values[scores.layout.positions("image")].sum()),
        heads,
    )


def text_positions(scores: Scores, token: int) -> Tensor:
    """Return the positions of the text tokens that an answer's token could see, int64, ascending."""
    row = scores.trace.rows[token]
    places = torch.cat([scores.layout.positions(name) for name in _text_segments(scores)]).sort().values
    return places[places <= row]


def _text_segments(scores: Scores) -> list[str]:
    """Return the segments of text; "timestamp" is one of them beside videos."""
    return ["system", *(["timestamp"] if scores.layout.videos else []), "query", "generated"]


def words_at(scores: Scores, places: Tensor) -> list[str]:
    """Return the texts of the tokens at some positions, spaces included."""
    return [scores.word_of(one) for one in scores.input_ids[places].tolist()]


def sinks(scores: Scores, factor: float) -> Tensor:
    """See `Explanation.sinks`."""
    if not factor > 1:
        raise InputError(f"factor says how much larger than usual a norm is, above 1, got {factor}")
    prompt = torch.arange(scores.layout.prompt_length)
    step = max(1, (1 << 29) // (4 * scores.text_model.width * (scores.num_layers + 1)))
    # the input of the first layer is the embedding, whose norm says nothing about attention
    norms = torch.cat(
        [scores.replay.layer_inputs(some)[:, 1:].float().norm(dim=-1).cpu() for some in prompt.split(step)]
    )
    return prompt[(norms > factor * norms.median(0).values).any(1)]
