"""Find the words of an answer that name an object of the image, and where the object is."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...core.errors import InputError
from ...core.layout import ImageLayout
from ..base import Evaluation
from ..judges.judge import NounJudge, shapes_judge
from ..samples import Sample, Thing

if TYPE_CHECKING:
    from ...explain.explanation import Explanation
    from ...vlm import VLM


@dataclass(frozen=True)
class Word:
    """A word of an answer that names an object of the image.

    Attributes:
        name: The name of the object.
        token: The index of the noun's first token in the answer.
        hits: The cells of the image's grid that count as the object, bool [rows, cols].
    """

    name: str
    token: int
    hits: np.ndarray


class WordEvaluation(Evaluation):
    """The base class of evaluations of single words: the nouns of descriptions that name an object of the image.

    Args:
        prompt: The prompt for the description.
        words: The vocabulary of objects to look for. None stands for that of the generated scenes.
        near: The number of tokens by which an object's mask is widened on every side.
        max_new_tokens: The largest number of tokens in the description.
    """

    def __init__(
        self,
        prompt: str = "Describe the image.",
        words: NounJudge | None = None,
        near: int = 1,
        max_new_tokens: int = 64,
    ):
        if near < 0:
            raise InputError(f"near is a number of tokens, 0 or more, got {near}")
        self.words = words or shapes_judge()
        self.settings: dict[str, Any] = {
            "prompt": prompt,
            "vocabulary": self.words.settings,
            "near": near,
            "max_new_tokens": max_new_tokens,
        }

    def explained(self, vlm: VLM, sample: Sample) -> tuple[Explanation, list[Word]]:
        """Explain a sample's description, and find its words for objects of the image."""
        if sample.things is None:
            raise InputError(f"{sample.name}: no masks are known of its objects")
        ex = vlm.explain(sample.image, self.settings["prompt"], max_new_tokens=self.settings["max_new_tokens"])
        return ex, words_at_objects(ex, self.words, sample.things, self.settings["near"])


def words_at_objects(ex: Explanation, judge: NounJudge, things: Sequence[Thing], near: int) -> list[Word]:
    """Return the answer's words for objects that are in the image, in their order.

    An object's mask covers all `things` of its name, and is widened by `near` tokens on every side.
    """
    layout, starts = ex.layout.images[0], np.cumsum([0, *map(len, ex.tokens)])
    found = []
    for mention in judge.mentions("".join(ex.tokens)):
        masks = [thing.mask for thing in things if thing.name == mention.name]
        if masks:
            token = int(np.searchsorted(starts, mention.noun, side="right")) - 1
            found.append(Word(mention.name, token, widened(cells(np.any(masks, 0), layout), near)))
    return found


def cells(mask: np.ndarray, layout: ImageLayout) -> np.ndarray:
    """Return the cells of an image's grid that have at least one pixel of a mask.

    Args:
        mask: The mask, bool [height, width].
        layout: The layout of the image.

    Returns:
        The cells, bool [rows, cols].

    Raises:
        InputError: The mask does not have the size of the image.
    """
    width, height = layout.size
    if mask.shape != (height, width):
        raise InputError(f"the mask is {mask.shape[1]} x {mask.shape[0]} pixels, its image {width} x {height}")
    rows, cols = layout.grid
    left, top, right, bottom = layout.box
    y, x = np.nonzero(mask)
    # the middle of a pixel decides its cell
    row, col = (y + 0.5 - top) / (bottom - top) * rows, (x + 0.5 - left) / (right - left) * cols
    inside = (row >= 0) & (row < rows) & (col >= 0) & (col < cols)
    found = np.zeros((rows, cols), bool)
    found[row[inside].astype(int), col[inside].astype(int)] = True
    return found


def widened(cells: np.ndarray, by: int) -> np.ndarray:
    """Return the cells within a distance of `by` from a cell that is set. Diagonal steps count as one."""
    padded = np.pad(cells, by)
    rows, cols = cells.shape
    shifts = [padded[i : i + rows, j : j + cols] for i in range(2 * by + 1) for j in range(2 * by + 1)]
    return np.any(shifts, 0)


def cells_within(mask: np.ndarray, layout: ImageLayout, tokens: float) -> np.ndarray:
    """Return the cells whose centre lies at most so many tokens from a pixel of a mask, bool [rows, cols].

    The distance is measured across and down in widths and heights of a token. Pixels count at their centres.

    Raises:
        InputError: The mask does not have the size of the image.
    """
    cells(mask, layout)  # checks the size
    rows, cols = layout.grid
    left, top, right, bottom = layout.box
    wide, high = (right - left) / cols, (bottom - top) / rows
    found = np.zeros((rows, cols), bool)
    for row in range(rows):
        for col in range(cols):
            x, y = left + (col + 0.5) * wide, top + (row + 0.5) * high
            begin = [max(0, math.floor(at - tokens * by)) for at, by in ((y, high), (x, wide))]
            end = [math.ceil(at + tokens * by) for at, by in ((y, high), (x, wide))]
            part = mask[begin[0] : end[0], begin[1] : end[1]]
            down, across = np.nonzero(part)
            far = ((down + begin[0] + 0.5 - y) / high) ** 2 + ((across + begin[1] + 0.5 - x) / wide) ** 2
            found[row, col] = bool((far <= tokens**2).any())
    return found


def phrase_tokens(tokens: Sequence[str], name: str, judge: NounJudge | None) -> list[int]:
    """Return the tokens of an answer that spell an object's name, all mentions together.

    With a vocabulary they are those of its noun phrases of this name. Otherwise, or if there is none, they spell the
    name itself, in the singular or the plural.
    """
    text = "".join(tokens)
    spans = [mention.phrase for mention in judge.mentions(text) if mention.name == name] if judge else []
    if not spans and name.strip():
        pattern = r"\s+".join(map(re.escape, name.split()))
        spans = [match.span() for match in re.finditer(rf"\b{pattern}(?:s|es)?\b", text, re.IGNORECASE)]
    ends = np.cumsum([len(token) for token in tokens])
    starts = ends - [len(token) for token in tokens]
    inside = [(starts < end) & (ends > begin) for begin, end in spans]
    return np.flatnonzero(np.any(inside, 0)).tolist() if spans else []
