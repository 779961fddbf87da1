"""The order in which letters stand in a line that has text from left to right and from right to left.

It is the Unicode bidirectional algorithm (UAX 9) for one line without control marks; brackets are marks like others.
"""

from __future__ import annotations

import unicodedata
from itertools import groupby

_BASE = "LR"  # the direction of a line of level 0 and 1


def levels_of(text: str) -> list[int]:
    """Return the level of each letter; text of odd levels goes from right to left."""
    # of kinds "L" and "R" for letters, "1" for a number that goes with what is around it, " " for everything else
    base = int(next((one for one in map(_kind, text) if one in _BASE), "L") == "R")
    kinds: list[str] = []
    strong = _BASE[base]
    for letter, kind in zip(_numbers(text), map(_kind, text), strict=True):
        strong = kind if kind in _BASE else strong
        kinds.append((letter if strong == "R" or letter == "AN" else "L") if letter in ("EN", "AN") else kind)
    kinds = ["1" if one in ("EN", "AN") else " " if one == "1" else one for one in kinds]
    start = 0
    for neutral, group in groupby(kinds, lambda one: one == " "):
        end = start + len(list(group))
        if neutral:  # spaces and marks go with their neighbours, if these agree; numbers among R count as R
            around = {"L" if one == "L" else "R" for one in (kinds[start - 1 : start] or [_BASE[base]])}
            around |= {"L" if one == "L" else "R" for one in (kinds[end : end + 1] or [_BASE[base]])}
            kinds[start:end] = [around.pop() if len(around) == 1 else _BASE[base]] * (end - start)
        start = end
    return [{"L": 2 * base, "R": 1, "1": 2}[one] for one in kinds]


def _numbers(text: str) -> list[str]:
    """Return each letter's bidirectional type, where signs and marks that are part of a number are numbers as well."""
    types = [unicodedata.bidirectional(one) for one in text]
    arabic = False
    for i, kind in enumerate(types):
        arabic = kind == "AL" if kind in ("L", "R", "AL") else arabic
        if kind == "EN" and arabic:
            types[i] = "AN"
    for i in range(1, len(types) - 1):  # one mark between two digits, such as a decimal point
        sides = {types[i - 1], types[i + 1]}
        if (types[i] == "CS" and sides in ({"EN"}, {"AN"})) or (types[i] == "ES" and sides == {"EN"}):
            types[i] = types[i - 1]
    for order in (range(1, len(types)), range(len(types) - 2, -1, -1)):  # signs before or behind, such as %
        for i in order:
            beside = types[i - 1 if order.step > 0 else i + 1]
            if types[i] == "ET" and beside == "EN":
                types[i] = "EN"
    return types


def _kind(letter: str) -> str:
    found = unicodedata.bidirectional(letter)
    return "L" if found == "L" else "R" if found in ("R", "AL") else "1" if found in ("EN", "AN") else " "
