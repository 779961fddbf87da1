"""Judges that find which objects two descriptions share (arXiv 2411.17491, section 4.2).

The judge in this module needs no network. It finds the noun phrases of a given vocabulary.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ...core.errors import InputError
from ...shapes.scenes import COLORS, SHAPES

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_MOST = 100  # a larger number counts as one object: "2024 people" is a year


class Comparison(NamedTuple):
    """The objects of two descriptions. Each object is listed as often as it is there.

    Attributes:
        reference: The objects of the reference.
        said: The objects of the description that is judged.
        matched: The objects of `said` that the reference has.
        missed: The objects of the reference that `said` lacks.
        tokens: The number of tokens that the judge's answer cost.
    """

    reference: list[str]
    said: list[str]
    matched: list[str]
    missed: list[str]
    tokens: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """The numbers of true positives "tp", false positives "fp" and false negatives "fn"."""
        tp = len(self.matched)
        return {"tp": tp, "fp": len(self.said) - tp, "fn": len(self.missed)}

    @property
    def labels(self) -> list[tuple[str, str]]:
        """The label of every object, as (object, "tp", "fp" or "fn")."""
        wrong = (Counter(self.said) - Counter(self.matched)).elements()
        parts = (("tp", self.matched), ("fp", wrong), ("fn", self.missed))
        return [(name, label) for label, names in parts for name in sorted(names)]


class Unjudged(Exception):  # noqa: N818
    """Raised when a judge gave no usable answer. `tokens` is what it cost."""

    def __init__(self, why: str, tokens: int = 0):
        super().__init__(why)
        self.tokens = tokens


class Judge(Protocol):
    """A judge finds which objects two descriptions name and share.

    `settings` are plain JSON and decide its answers. `compare` raises Unjudged without a usable answer.
    """

    @property
    def settings(self) -> dict[str, Any]: ...

    def compare(self, reference: str, said: str) -> Comparison: ...


class Mention(NamedTuple):
    """A mention of an object in a text.

    Attributes:
        attributes: The attributes, as the vocabulary calls them.
        thing: The noun, as the vocabulary calls it.
        number: How many of the objects there are.
        noun: The position in the text where the noun begins, in characters.
        phrase: The positions in the text where the attributes and the noun begin and end, in characters.
    """

    attributes: tuple[str, ...]
    thing: str
    number: int
    noun: int
    phrase: tuple[int, int]

    @property
    def name(self) -> str:
        return " ".join([*self.attributes, self.thing])


class NounJudge:
    """A judge that finds the noun phrases of a vocabulary.

    A noun phrase is a noun and the attributes right before it, in any order and number. Two phrases name the same
    object if their nouns and attributes are the same. "two red circles" counts as two objects, and a plural without a
    number as one.

    Args:
        nouns, attributes: Other words for each name. Regular plurals need not be given.

    Raises:
        InputError: There is no noun, or one word stands for two names.
    """

    def __init__(self, nouns: Mapping[str, Iterable[str]], attributes: Mapping[str, Iterable[str]] | None = None):
        if not nouns:
            raise InputError("a vocabulary has at least one noun")
        self.nouns = {name: sorted(others) for name, others in sorted(nouns.items())}
        self.attributes = {name: sorted(others) for name, others in sorted((attributes or {}).items())}
        self._noun_of = _words(self.nouns, plurals=True)
        self._attribute_of = _words(self.attributes, plurals=False)
        number = "|".join([*_NUMBERS, r"\d{1,3}"])
        attribute = _any_of(self._attribute_of)
        between = r"(?:\s+and\s+|\s*,\s*|\s+)"  # "a red, round ball"
        self._phrase = re.compile(
            rf"\b(?:(?P<number>{number})\s+)?(?P<attributes>(?:{attribute}{between})*)(?P<noun>{_any_of(self._noun_of)})\b",
            re.IGNORECASE,
        )
        self._attribute = re.compile(rf"\b{attribute}\b", re.IGNORECASE)

    @property
    def settings(self) -> dict[str, Any]:
        """The vocabulary, as plain JSON."""
        return {"judge": "nouns", "nouns": self.nouns, "attributes": self.attributes}

    def mentions(self, text: str) -> list[Mention]:
        """Return the mentions of objects in a text, in their order."""
        found = []
        for match in self._phrase.finditer(text):
            leading = {self._attribute_of[_plain(word)] for word in self._attribute.findall(match["attributes"])}
            thing = self._noun_of[_plain(match["noun"])]
            phrase = match.start("attributes"), match.end("noun")
            found.append(Mention(tuple(sorted(leading)), thing, _number(match["number"]), match.start("noun"), phrase))
        return found

    def objects(self, text: str) -> list[str]:
        """Return the names of a text's objects, each as often as it is there."""
        return [mention.name for mention in self.mentions(text) for _ in range(mention.number)]

    def compare(self, reference: str, said: str) -> Comparison:
        """Compare the objects of two descriptions."""
        left, right = self.objects(reference), self.objects(said)
        both = Counter(left) & Counter(right)
        return Comparison(left, right, sorted(both.elements()), sorted((Counter(left) - both).elements()))


def shapes_judge() -> NounJudge:
    """Return the judge with the vocabulary of the generated scenes, on which it is exact."""
    return NounJudge({shape: () for shape in SHAPES}, {color: () for color in COLORS})


def read_vocabulary(path: Path) -> NounJudge:
    """Return the judge with the vocabulary of a JSON file.

    The file holds {"nouns": {name: [other words]}, "attributes": {...}}. A list of names may replace either dictionary.

    Raises:
        InputError: The file does not exist, or it has another format.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        parts = [_named(found.pop(name, {})) for name in ("nouns", "attributes")]
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (ValueError, TypeError, AttributeError):
        raise InputError(
            f'{path}: a vocabulary is JSON, {{"nouns": {{"dog": ["puppy"]}}, "attributes": {{}}}}'
        ) from None
    if found:
        raise InputError(f"{path}: a vocabulary has nouns and attributes, not {', '.join(map(repr, found))}")
    return NounJudge(*parts)


def _named(entries: Any) -> dict[str, list[str]]:
    """Return the other words for each name, after a check of their types."""
    if isinstance(entries, list):
        entries = {name: [] for name in entries}
    for words in ([*entries.keys()], *entries.values()):
        if not isinstance(words, list) or not all(isinstance(word, str) and word.strip() for word in words):
            raise TypeError("not a list of words")
    return entries


def _words(names: Mapping[str, Iterable[str]], plurals: bool) -> dict[str, str]:
    """Return the name that every word stands for."""
    found: dict[str, str] = {}
    for name, others in names.items():
        for word in map(_plain, (name, *others)):
            for form in (word, *(_plurals(word) if plurals else ())):
                if found.setdefault(form, name) != name:
                    raise InputError(f"the vocabulary has {form!r} for {found[form]!r} and for {name!r}")
    return found


def _any_of(words: Iterable[str]) -> str:
    """Return a pattern that matches any of the words, longer ones first. Without words it matches nothing."""
    return "(?:" + ("|".join(_spaced(word) for word in sorted(words, key=len, reverse=True)) or "(?!)") + ")"


def _spaced(word: str) -> str:
    return r"\s+".join(map(re.escape, word.split()))


def _plain(word: str) -> str:
    return " ".join(word.lower().split())


def _plurals(word: str) -> list[str]:
    """Return the likely regular plurals of a noun. A spelling that does not exist does no harm."""
    if re.search(r"[^aeiou]y$", word):
        return [word[:-1] + "ies"]
    if re.search(r"(s|x|z|ch|sh)$", word):
        return [word + "es"]
    if re.search(r"(f|fe)$", word):
        return [word + "s", re.sub(r"fe?$", "ves", word)]
    return [word + "s", word + "es"] if word.endswith("o") else [word + "s"]


def _number(number: str | None) -> int:
    if number is None:
        return 1
    count = int(number) if number.isdigit() else _NUMBERS.index(number.lower())
    return count if count <= _MOST else 1


def scores(tp: float, fp: float, fn: float) -> dict[str, float | None]:
    """Return precision, recall and F1 from counts (arXiv 2411.17491, appendix B).

    The precision of a text that names nothing is 0 if there was something to name. A value is None where there is
    nothing to count.
    """
    share = lambda part, whole: part / whole if whole else None  # noqa: E731
    precision = share(tp, tp + fp) if tp + fp or not fn else 0.0
    return {"precision": precision, "recall": share(tp, tp + fn), "f1": share(2 * tp, 2 * tp + fp + fn)}
