"""Ask a judge of descriptions for one JSON object, with all objects and with pairs of those that are the same.

Properties count here: "a red car" and "a blue car" are two objects.
"""

from __future__ import annotations

import json
from typing import Any

from .judge import Comparison
from .replies import json_object

INSTRUCTIONS = """\
You compare two descriptions of one picture, A and B, by the physical objects they name.

List every object that A says is in the picture, and every object that B says is there. An object is a thing, person \
or animal, named by a short noun phrase; colours and other properties belong to it. "Two dogs" are two entries. What \
is said to be absent is no object, nor is a feeling, a style or the picture itself.

Then pair each object of B with at most one object of A, and each of A with at most one of B, if both may well be the \
same thing: synonyms and more or less general words pair ("puppy" with "dog"), and so do phrases of which only one \
tells a property; two that contradict each other ("a red car", "a blue car") do not.

Answer with one JSON object and nothing else: {"a": [objects of A], "b": [objects of B], "pairs": [[i, j], ...]}, \
where i and j count the entries of "a" and "b" from 0."""
EXAMPLES = (
    (
        "A brown puppy lies on a couch beside a red ball.",
        "There is a dog on a sofa. A lamp stands in the corner.",
        {
            "a": ["brown puppy", "couch", "red ball"],
            "b": ["dog", "sofa", "lamp"],
            "pairs": [[0, 0], [1, 1]],
        },
    ),
    (
        "Two women wait at a bus stop; one holds an umbrella.",
        "A woman with a green umbrella, no bus in sight.",
        {"a": ["woman", "woman", "bus stop", "umbrella"], "b": ["woman", "green umbrella"], "pairs": [[0, 0], [3, 1]]},
    ),
    (
        "A white truck drives past a field.",
        "a calm and pleasant scene, a black truck",
        {"a": ["white truck", "field"], "b": ["black truck"], "pairs": []},
    ),
)


def parse(text: str) -> Comparison:
    """Return the comparison in a reply. What stands around the JSON is left out.

    Raises:
        ValueError: The reply has no JSON of the requested form, or an object is paired twice.
    """
    found = json_object(text, ("a", "b", "pairs"))
    for name in ("a", "b"):
        if not isinstance(found[name], list) or not all(isinstance(entry, str) for entry in found[name]):
            raise ValueError(f'"{name}" is no list of texts')
    pairs = found["pairs"]
    if not isinstance(pairs, list) or not all(_is_pair(pair, len(found["a"]), len(found["b"])) for pair in pairs):
        raise ValueError('"pairs" are not pairs of places in "a" and "b"')
    for side in (0, 1):
        if len({pair[side] for pair in pairs}) < len(pairs):
            raise ValueError("an object is paired twice")
    paired = {i for i, _ in pairs}
    missed = [name for i, name in enumerate(found["a"]) if i not in paired]
    return Comparison(found["a"], found["b"], [found["b"][j] for _, j in pairs], missed)


def _is_pair(pair: Any, first: int, second: int) -> bool:
    if not isinstance(pair, list) or [type(i) for i in pair] != [int, int]:
        return False
    return 0 <= pair[0] < first and 0 <= pair[1] < second


def messages(reference: str, said: str) -> list[dict[str, str]]:
    """Return the messages that ask for the objects of two descriptions."""
    ask = lambda a, b: {"role": "user", "content": f"A: {json.dumps(a)}\nB: {json.dumps(b)}"}  # noqa: E731
    found = [{"role": "system", "content": INSTRUCTIONS}]
    for a, b, reply in EXAMPLES:
        found += [ask(a, b), {"role": "assistant", "content": json.dumps(reply)}]
    return [*found, ask(reference, said)]
