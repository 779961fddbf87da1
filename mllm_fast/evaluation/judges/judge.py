"""Which objects do two descriptions share? (arXiv 2411.17491, section 4.2.) The judge that needs no network finds the
noun phrases of a given vocabulary."""

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
_MOST = 100  # of one kind, from a number in digits: "2024 people" is a year


class Comparison(NamedTuple):
    """Objects of a reference and of what was said; those of the latter that the reference has, and those of the
    reference that were missed; each as often as it is there. `tokens`: what it cost to ask."""

    reference: list[str]
    said: list[str]
    matched: list[str]
    missed: list[str]
    tokens: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """tp, fp, fn."""
        tp = len(self.matched)
        return {"tp": tp, "fp": len(self.said) - tp, "fn": len(self.missed)}

    @property
    def labels(self) -> list[tuple[str, str]]:
        """(object, "tp", "fp" or "fn") of every object."""
        wrong = (Counter(self.said) - Counter(self.matched)).elements()
        parts = (("tp", self.matched), ("fp", wrong), ("fn", self.missed))
        return [(name, label) for label, names in parts for name in sorted(names)]


class Unjudged(Exception):  # noqa: N818
    """No usable answer was had of a judge; `tokens`: what it cost."""

    def __init__(self, why: str, tokens: int = 0):
        super().__init__(why)
        self.tokens = tokens


class Judge(Protocol):
    """Says which objects two descriptions name and share, or raises Unjudged. `settings`, plain JSON, decide what it
    says."""

    @property
    def settings(self) -> dict[str, Any]: ...

    def compare(self, reference: str, said: str) -> Comparison: ...


class Mention(NamedTuple):
    """An object in a text: its attributes and noun, as the vocabulary calls them, how many there are, and where the
    noun begins, in characters."""

    attributes: tuple[str, ...]
    thing: str
    number: int
    noun: int

    @property
    def name(self) -> str:
        return " ".join([*self.attributes, self.thing])


class NounJudge:
    """Noun phrases of a vocabulary: a noun and the attributes right before it, in any order and number.

    nouns, attributes: name -> other words for it; plurals need not be given if they are regular. Two phrases name the
    same object if noun and attributes are the same; "two red circles" are two, and a plural without a number one.

    Raises:
        InputError: no noun, or one word for two names.
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
        """The vocabulary."""
        return {"judge": "nouns", "nouns": self.nouns, "attributes": self.attributes}

    def mentions(self, text: str) -> list[Mention]:
        """The objects of a text, in its order."""
        found = []
        for match in self._phrase.finditer(text):
            leading = {self._attribute_of[_plain(word)] for word in self._attribute.findall(match["attributes"])}
            thing = self._noun_of[_plain(match["noun"])]
            found.append(Mention(tuple(sorted(leading)), thing, _number(match["number"]), match.start("noun")))
        return found

    def objects(self, text: str) -> list[str]:
        """The names of a text's objects, each as often as it is there."""
        return [mention.name for mention in self.mentions(text) for _ in range(mention.number)]

    def compare(self, reference: str, said: str) -> Comparison:
        """Of two descriptions."""
        left, right = self.objects(reference), self.objects(said)
        both = Counter(left) & Counter(right)
        return Comparison(left, right, sorted(both.elements()), sorted((Counter(left) - both).elements()))


def shapes_judge() -> NounJudge:
    """Exact on the generated scenes."""
    return NounJudge({shape: () for shape in SHAPES}, {color: () for color in COLORS})


def read_vocabulary(path: Path) -> NounJudge:
    """The judge of a JSON file: {"nouns": {name: [other words]}, "attributes": {...}}; a list will do for either.

    Raises:
        InputError: no such file, or one of another form.
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
    """name -> other words."""
    if isinstance(entries, list):
        entries = {name: [] for name in entries}
    for words in ([*entries.keys()], *entries.values()):
        if not isinstance(words, list) or not all(isinstance(word, str) and word.strip() for word in words):
            raise TypeError("not a list of words")
    return entries


def _words(names: Mapping[str, Iterable[str]], plurals: bool) -> dict[str, str]:
    """Every word -> its name."""
    found: dict[str, str] = {}
    for name, others in names.items():
        for word in map(_plain, (name, *others)):
            for form in (word, *(_plurals(word) if plurals else ())):
                if found.setdefault(form, name) != name:
                    raise InputError(f"the vocabulary has {form!r} for {found[form]!r} and for {name!r}")
    return found


def _any_of(words: Iterable[str]) -> str:
    """A pattern of any of the words, longer ones first; one that nothing fits if there is none."""
    return "(?:" + ("|".join(_spaced(word) for word in sorted(words, key=len, reverse=True)) or "(?!)") + ")"


def _spaced(word: str) -> str:
    return r"\s+".join(map(re.escape, word.split()))


def _plain(word: str) -> str:
    return " ".join(word.lower().split())


def _plurals(word: str) -> list[str]:
    """Regular plurals of a noun, the likely ones: one spelling more does no harm."""
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
    """Precision, recall and F1 of counts; None where there is nothing to count."""
    share = lambda part, whole: part / whole if whole else None  # noqa: E731
    return {"precision": share(tp, tp + fp), "recall": share(tp, tp + fn), "f1": share(2 * tp, 2 * tp + fp + fn)}
