"""Questions about a scene with their answers, on which the embedded model is trained and tested."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .scenes import COLORS, SHAPES, Scene

TASKS = ("color", "shape", "exists", "count", "describe")
NUMBERS = ("zero", "one", "two", "three", "four")
_COLOR = ("what color is the {}?", "what is the color of the {}?")
_SHAPE = ("what shape is the {} object?", "what is the shape of the {} object?")
_COUNT = ("how many objects are there?", "how many objects are in the image?")
_DESCRIBE = ("describe the image.", "describe the picture.", "describe the image", "describe the picture")


@dataclass(frozen=True)
class Question:
    """A question about a scene, with its answer.

    Attributes:
        task: The kind of question, one of `TASKS`.
        text: The question.
        answer: The answer.
        target: The index of the object that is asked about, or None if there is no single one.
        keywords: The colour or shape words in the question.
    """

    task: str
    text: str
    answer: str
    target: int | None = None
    keywords: tuple[str, ...] = ()


def ask(scene: Scene, rng: np.random.Generator, task: str) -> Question | None:
    """Draw a question of the kind `task`; None if the scene does not allow it, e.g. if every shape occurs twice."""
    if task not in TASKS:
        raise ValueError(f"task is one of {', '.join(TASKS)}, got {task!r}")
    return _ASK[task](scene, rng)


def describe(scene: Scene) -> str:
    """Describe every object from left to right, as in "a red circle, a blue square".

    The article is always "a", so that one rule gives the answer for a scene. Questions use "a" and "an".
    """
    return ", ".join(f"a {o.color} {o.shape}" for o in scene.objects)


def _article(word: str, rng: np.random.Generator) -> str:
    return "an" if word[0] in "aeiou" and rng.random() < 0.5 else "a"


def _unique(words: list[str]) -> list[int]:
    return [i for i, word in enumerate(words) if words.count(word) == 1]


def _pick(rng: np.random.Generator, items):
    return items[int(rng.integers(len(items)))]


def _ask_color(scene: Scene, rng: np.random.Generator) -> Question | None:
    candidates = _unique([o.shape for o in scene.objects])
    if not candidates:
        return None
    i = _pick(rng, candidates)
    target = scene.objects[i]
    return Question("color", _pick(rng, _COLOR).format(target.shape), target.color, i, (target.shape,))


def _ask_shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    candidates = _unique([o.color for o in scene.objects])
    if not candidates:
        return None
    i = _pick(rng, candidates)
    target = scene.objects[i]
    return Question("shape", _pick(rng, _SHAPE).format(target.color), target.shape, i, (target.color,))


def _ask_count(scene: Scene, rng: np.random.Generator) -> Question:
    return Question("count", _pick(rng, _COUNT), NUMBERS[len(scene.objects)])


def _ask_describe(scene: Scene, rng: np.random.Generator) -> Question:
    return Question("describe", _pick(rng, _DESCRIBE), describe(scene))


def _ask_exists(scene: Scene, rng: np.random.Generator) -> Question:
    present = rng.random() < 0.5
    kind = rng.choice(("pair", "shape", "color"), p=(0.6, 0.25, 0.15))
    if kind == "shape":
        return _exists_one(scene, rng, present, "shape", SHAPES, "is there {} {}?")
    if kind == "color":
        return _exists_one(scene, rng, present, "color", tuple(COLORS), "is there {} {} object?")
    pairs = [(o.color, o.shape) for o in scene.objects]
    if present:
        pair = _pick(rng, pairs)
        target = pairs.index(pair) if pairs.count(pair) == 1 else None
        return _pair_question(pair, "yes", target, rng)
    # half of the absent pairs are near misses: a colour and a shape that are there, but not together
    near = sorted({(c, s) for c, _ in pairs for _, s in pairs} - set(pairs))
    if near and rng.random() < 0.5:
        return _pair_question(_pick(rng, near), "no", None, rng)
    absent = sorted({(c, s) for c in COLORS for s in SHAPES} - set(pairs))
    return _pair_question(_pick(rng, absent), "no", None, rng)


def _pair_question(pair: tuple[str, str], answer: str, target: int | None, rng: np.random.Generator) -> Question:
    color, shape = pair
    return Question("exists", f"is there {_article(color, rng)} {color} {shape}?", answer, target, pair)


def _exists_one(scene: Scene, rng, present: bool, attribute: str, words: tuple[str, ...], template: str) -> Question:
    there = [getattr(o, attribute) for o in scene.objects]
    word = _pick(rng, there if present else [w for w in words if w not in there])
    target = there.index(word) if there.count(word) == 1 else None
    text = template.format(_article(word, rng), word)
    return Question("exists", text, "yes" if present else "no", target, (word,))


_ASK = {
    "color": _ask_color,
    "shape": _ask_shape,
    "exists": _ask_exists,
    "count": _ask_count,
    "describe": _ask_describe,
}

_OTHER_WORDS = (  # noqa: SIM905
    "what is the color of shape object a an there how many objects are in describe image picture yes no user assistant"
    " do you see which where and"
).split()
WORDS = tuple(sorted({*_OTHER_WORDS, *NUMBERS, *SHAPES, *COLORS}))
