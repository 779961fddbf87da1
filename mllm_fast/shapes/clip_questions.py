"""Questions about a clip with their answers, on which the embedded video model is trained and tested."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .clips import Clip, ClipObject
from .questions import WORDS

TASKS = ("start", "end", "moves", "appears", "describe")
FRAME_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
_COLOR = ("what color is the {} at the {}?", "what is the color of the {} at the {}?")
_DESCRIBE = ("describe the image.", "describe the video.", "describe the image", "describe the video")
_OTHER_WORDS = ("at", "start", "end", "moves", "half", "does", "appear", "first", "second", "video", "frame")
CLIP_WORDS = tuple(sorted({*WORDS, *FRAME_NUMBERS, *_OTHER_WORDS}))


@dataclass(frozen=True)
class ClipQuestion:
    """A question about a clip, with its answer and the moment that it asks about.

    Attributes:
        task: The kind of question, one of `TASKS`.
        text: The question.
        answer: The answer.
        target: The index of the object that is asked about, or None if there is no single one.
        frames: The first and the last frame that show what is asked about. A colour is shown until or since it turns;
            a movement all the time; an appearance from its frame to the end of its half.
        keywords: The colour or shape words in the question.
    """

    task: str
    text: str
    answer: str
    target: int | None
    frames: tuple[int, int]
    keywords: tuple[str, ...] = ()


def ask(clip: Clip, rng: np.random.Generator, task: str) -> ClipQuestion | None:
    """Draw a question of the kind `task`; None if the clip does not allow it."""
    if task not in TASKS:
        raise ValueError(f"task is one of {', '.join(TASKS)}, got {task!r}")
    if task == "describe":
        last = len(clip.pixels) - 1
        return ClipQuestion(task, _pick(rng, _DESCRIBE), describe(clip), None, (0, last))
    possible = [i for i, one in enumerate(clip.objects) if _POSSIBLE[task](clip, one)]
    # a colour that turns is asked for more often than one that stays
    turning = [i for i in possible if clip.objects[i].event == "turns"]
    if turning and rng.random() < 0.7:
        possible = turning
    return _ask(clip, rng, task, _pick(rng, possible)) if possible else None


def describe(clip: Clip) -> str:
    """Describe the last frame's objects from left to right, as in "a red circle, a blue square"."""
    return ", ".join(f"a {one.colors[-1]} {one.shape}" for one in clip.objects)


def half_of(clip: Clip, one: ClipObject) -> tuple[str, int]:
    """Return the half in which an object appears, and the last frame of that half."""
    last = len(clip.pixels) - 1
    return ("first", last // 2) if 2 * one.at < last + 1 else ("second", last)


def _ask(clip: Clip, rng: np.random.Generator, task: str, target: int) -> ClipQuestion:
    one, last = clip.objects[target], len(clip.pixels) - 1
    if task in ("start", "end"):
        text = _pick(rng, _COLOR).format(one.shape, task)
        turned = one.event == "turns"
        frames = (0, one.at - 1 if turned else last) if task == "start" else (one.at if turned else 0, last)
        return ClipQuestion(task, text, one.colors[0 if task == "start" else -1], target, frames, (one.shape,))
    if task == "moves":
        return ClipQuestion(task, f"which {one.shape} moves?", one.colors[0], target, (0, last), (one.shape,))
    text = f"in which half does the {one.colors[0]} {one.shape} appear?"
    half, end = half_of(clip, one)
    return ClipQuestion(task, text, half, target, (one.at, end), (one.colors[0], one.shape))


def _one_of_its_shape(clip: Clip, one: ClipObject) -> bool:
    return one.event != "appears" and sum(other.shape == one.shape for other in clip.objects) == 1


def _one_that_moves(clip: Clip, one: ClipObject) -> bool:
    moving = [other for other in clip.objects if other.shape == one.shape and other.event == "moves"]
    return moving == [one]


def _one_that_appears(clip: Clip, one: ClipObject) -> bool:
    alike = [other for other in clip.objects if other.shape == one.shape and one.colors[0] in other.colors]
    return one.event == "appears" and len(alike) == 1


_POSSIBLE = {
    "start": _one_of_its_shape,
    "end": _one_of_its_shape,
    "moves": _one_that_moves,
    "appears": _one_that_appears,
}


def _pick(rng: np.random.Generator, items: Sequence):
    return items[int(rng.integers(len(items)))]
