"""Ask a judge of descriptions to think in words first, then to list the objects (arXiv 2411.17491, figure A2).

Properties do not count: "a red car" and "a blue car" are both "car". An object counts once, however often it is there.
The words and the three worked examples are this project's own. The judge's own precision and recall are not read: they
follow from its lists.
"""

from __future__ import annotations

import re

from .judge import Comparison

INSTRUCTIONS = """\
You are given two texts about one picture: a ground truth and a prediction. Find out which physical objects of the \
ground truth the prediction names too.

Work in this order, and write every step down:
1. Think aloud, in a few sentences: which words of each text are physical things, people or animals that can be \
touched, and which of them may be the same thing under another name? Colours, sizes, positions, \
actions, numbers, moods and the scenery as a whole are not objects. What a text says is absent is not an object.
2. List the objects of each text, each object once, by its bare noun: "two red cars" and "a blue car" are both "car".
3. Pair the objects. Synonyms pair, and so do a general and a special word for one thing ("puppy" with "dog").
4. Give the lists and the figures, each on a line of its own that begins as in the examples, with commas between \
objects, and "none" for an empty list. Write a paired object as the ground truth calls it."""

EXAMPLES = (
    (
        "A brown puppy lies on a couch beside a red ball. The room is warm and quiet.",
        "There is a black dog on a sofa. A lamp stands in the corner.",
        """\
Thoughts: The ground truth names a puppy, a couch and a ball; the room and its mood are scenery. The prediction names \
a dog, a sofa and a lamp. A puppy is a dog, and its colour does not matter. A sofa is a couch. Nobody mentions \
the ball in the prediction, and there is no lamp in the ground truth.
Objects in the ground truth: puppy, couch, ball
Objects in the prediction: dog, sofa, lamp
True positives: puppy, couch
False positives: lamp
False negatives: ball
Precision: 2/3
Recall: 2/3""",
    ),
    (
        "Two women wait at a bus stop, one of them in a yellow raincoat, holding an umbrella. Behind them is a blue car"
        " and a red car.",
        "A woman with a green umbrella stands beside a car. There is no bus.",
        """\
Thoughts: The ground truth has women, a bus stop, a raincoat, an umbrella and cars. The two cars are one entry, and so \
are the two women. The prediction has a woman, an umbrella and a car; the bus is said to be absent, so it is not an \
object. The colours of the umbrella and the car do not matter.
Objects in the ground truth: woman, bus stop, raincoat, umbrella, car
Objects in the prediction: woman, umbrella, car
True positives: woman, umbrella, car
False positives: none
False negatives: bus stop, raincoat
Precision: 3/3
Recall: 3/5""",
    ),
    (
        "A white truck drives past a field where horses graze.",
        "a calm and pleasant scene, with a sense of peace",
        """\
Thoughts: The ground truth has a truck, a field and horses. The prediction speaks of a mood alone and names nothing \
that can be touched.
Objects in the ground truth: truck, field, horse
Objects in the prediction: none
True positives: none
False positives: none
False negatives: truck, field, horse
Precision: 0
Recall: 0/3""",
    ),
)
_LISTS = ("true positives", "false positives", "false negatives")
_MARKS = re.compile(r"[*_#`>]+")
_BULLET = re.compile(r"^\s*(?:[-+•]|\d+[.)])\s*")
_HEADING = re.compile(r"^\s*([A-Za-z][A-Za-z ]*?)\s*(?:\([A-Z]+\))?\s*:\s*(.*)$")


def messages(reference: str, said: str) -> list[dict[str, str]]:
    """Return the messages that ask for the objects of two descriptions."""
    ask = lambda a, b: {"role": "user", "content": f"Ground truth: {a}\nPrediction: {b}"}  # noqa: E731
    found = [{"role": "system", "content": INSTRUCTIONS}]
    for a, b, reply in EXAMPLES:
        found += [ask(a, b), {"role": "assistant", "content": reply}]
    return [*found, ask(reference, said)]


def parse(text: str) -> Comparison:
    """Return the comparison in a reply: its lists of true positives, false positives and false negatives.

    A list stands on the line of its heading, or on lines of its own below it. Marks of Markdown and numbers of a list
    are removed, and an object that is listed twice counts once.

    Raises:
        ValueError: A list is missing, or one object is in two lists.
    """
    lists: dict[str, list[str]] = {}
    current = None
    for line in _MARKS.sub("", text).splitlines():
        heading = _HEADING.match(line)
        if heading:
            name = heading[1].lower()
            current = lists[name] = []  # the last list of a name counts
            current += _objects(heading[2])
        elif current is not None and line.strip():
            current += _objects(_BULLET.sub("", line))
    if missing := [name for name in _LISTS if name not in lists]:
        raise ValueError(f"there is no line {', '.join(map(repr, missing))}")
    tp, fp, fn = (list(dict.fromkeys(lists[name])) for name in _LISTS)
    for one, other in ((tp, fp), (tp, fn)):
        if twice := set(one) & set(other):
            raise ValueError(f"{sorted(twice)[0]!r} is in two lists")
    return Comparison([*tp, *fn], [*tp, *fp], tp, fn)


def _objects(text: str) -> list[str]:
    names = (" ".join(name.lower().split()).strip(" .;\"'") for name in re.split("[,;]", text))
    return [name for name in names if name not in ("", "none", "n/a", "-")]
