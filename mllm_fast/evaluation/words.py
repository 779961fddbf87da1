"""Words of an answer that name an object of the picture, and where that object is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from ..layout import ImageLayout
from .judge import NounJudge
from .samples import Thing

if TYPE_CHECKING:
    from ..explain import Explanation


@dataclass(frozen=True)
class Word:
    """`token`: the first one of the noun of `name`. `hits`: the cells of the picture's grid that count as its object,
    bool [rows, cols]."""

    name: str
    token: int
    hits: np.ndarray


def words_at_objects(ex: Explanation, judge: NounJudge, things: Sequence[Thing], near: int) -> list[Word]:
    """The answer's words for objects that are in the picture, in their order.

    An object's mask is that of all `things` of its name, `near` tokens wider on every side.
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
    """The cells of an image's grid with at least one pixel of a mask (bool [height, width]), bool [rows, cols]."""
    width, height = layout.size
    if mask.shape != (height, width):
        raise InputError(f"the mask is {mask.shape[1]} x {mask.shape[0]} pixels, its picture {width} x {height}")
    rows, cols = layout.grid
    left, top, right, bottom = layout.box
    y, x = np.nonzero(mask)
    # the pixel's middle tells its cell
    row, col = (y + 0.5 - top) / (bottom - top) * rows, (x + 0.5 - left) / (right - left) * cols
    inside = (row >= 0) & (row < rows) & (col >= 0) & (col < cols)
    found = np.zeros((rows, cols), bool)
    found[row[inside].astype(int), col[inside].astype(int)] = True
    return found


def widened(cells: np.ndarray, by: int) -> np.ndarray:
    """The cells within `by` of one that is set, diagonals included."""
    padded = np.pad(cells, by)
    rows, cols = cells.shape
    shifts = [padded[i : i + rows, j : j + cols] for i in range(2 * by + 1) for j in range(2 * by + 1)]
    return np.any(shifts, 0)
