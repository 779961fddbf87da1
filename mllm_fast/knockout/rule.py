"""The rules of attention knockout (arXiv 2411.17491): which tokens may not attend to which, in which layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

from ..core.errors import InputError
from ..core.notebook import Displayed, table

Tokens = str | Iterable[int]
Layers = str | Iterable[int]
_MOST = 1 << 20  # numbers in a text; ranges are written out, and no model has as many positions


@dataclass(frozen=True)
class Knockout(Displayed):
    """A rule: rows of `target` may not attend to keys of `source`, in `layers`.

    Args:
        source, target: A segment ("system", "image", "image:1", "query", "generated"), several segments joined by "+"
            ("query+generated"), or positions of the sequence, those of generated tokens included.
        layers: Layer numbers, or a text: "all", "from 20", "until 20" (20 itself excluded), "except 20-40", "0-7,12".
        zero_inputs: What happens in layers without attention (of hybrid models: linear attention, state spaces,
            convolutions), which carry the source from one position to the next in a state. If set, what mixes the
            positions there is given zeros in place of the source's rows, so that the state holds nothing of them, for
            all targets. Otherwise these layers stay as they are, and a warning names them.
    """

    source: Tokens
    target: Tokens
    layers: Layers = "all"
    zero_inputs: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.zero_inputs, bool):
            raise InputError(f"zero_inputs of a knockout is True or False, got {self.zero_inputs!r}")
        for name in ("source", "target", "layers"):
            value = getattr(self, name)
            if not isinstance(value, str):
                try:
                    object.__setattr__(self, name, tuple(index(i) for i in value))  # a generator can be read once only
                except (TypeError, ValueError):
                    raise InputError(f"{name} of a knockout is a text or whole numbers, got {value!r}") from None

    @classmethod
    def parse(cls, text: str, layers: str = "all", most: int = _MOST) -> Knockout:
        """Make a knockout from a text such as "image->query", "5,9-12->generated" or "image->query@from 20".

        Args:
            text: The rule, with or without its layers.
            layers: The layers of a rule that names none.
            most: How many positions there can be; numbers are below it.

        Raises:
            InputError: The text has no source, target or "->", or a number is too large.
        """
        rule, at, own_layers = text.partition("@")
        source, arrow, target = rule.partition("->")
        if not arrow or not source.strip() or not target.strip():
            raise InputError(
                f'a knockout is "source->target" or "source->target@layers", in quotes, got {text!r};'
                ' for example "image->query@from 4"'
            )
        return cls(
            _names_or_numbers(source, most), _names_or_numbers(target, most), own_layers.strip() if at else layers
        )

    def _repr_html_(self) -> str:
        layers = str(self).rpartition("@")[2]
        rows = [("rows of", _spelled(self.target)), ("do not attend to", _spelled(self.source)), ("in layers", layers)]
        return table([*rows, ("layers without attention", "given zeros" if self.zero_inputs else "unchanged")])

    def __str__(self) -> str:
        layers = self.layers if isinstance(self.layers, str) else spans(self.layers)  # type: ignore[arg-type]
        return f"{_spelled(self.source)}->{_spelled(self.target)}@{layers}"


def _names_or_numbers(text: str, most: int) -> Tokens:
    text = text.strip()
    return tuple(_numbers(text, most)) if re.fullmatch(r"[\d\s,-]+", text) else text


def _spelled(tokens: Tokens) -> str:
    return tokens if isinstance(tokens, str) else spans(tokens)  # type: ignore[arg-type]


def spans(numbers: Sequence[int]) -> str:
    """Return numbers as a text with ranges: 0, 1, 2, 5 as "0-2,5"."""
    found: list[list[int]] = []
    for n in sorted(set(numbers)):
        if found and n == found[-1][1] + 1:
            found[-1][1] = n
        else:
            found.append([n, n])
    return ",".join(f"{a}-{b}" if b > a else str(a) for a, b in found)


def _numbers(text: str, most: int = _MOST) -> list[int]:
    """Return the numbers of a text such as "0-7,12", each below `most` and at most as many."""
    found: list[int] = []
    for part in text.split(","):
        span = re.fullmatch(r"\s*0*(\d+)\s*(?:-\s*0*(\d+)\s*)?", part)
        # the number of digits is checked first: the conversion of thousands of them is slow, or refused
        if span and max(len(span[1]), len(span[2] or "")) <= len(str(most)):
            first, last = int(span[1]), int(span[2] or span[1])
            if first <= last < most and len(found) + last - first < most:
                found += range(first, last + 1)
                continue
            if first <= last:
                raise InputError(_too_large(text, most))
        elif span:
            raise InputError(_too_large(text, most))
        raise InputError(f"numbers are given as 3 or 0-7 or 0-7,12, got {text.strip()[:80]!r}")
    return found


def _too_large(text: str, most: int) -> str:
    return f"numbers are below {most:,}, and at most as many, got {text.strip()[:80]!r}"


def parse_layers(layers: Layers, num_layers: int) -> frozenset[int]:
    """Return the layers that a rule names, for a model with `num_layers` layers.

    Raises:
        InputError: The model does not have one of the layers, or the text is not understood.
    """
    every = range(num_layers)
    if not isinstance(layers, str):
        chosen = frozenset(layers)
    else:
        word, _, rest = layers.strip().partition(" ")
        if layers.strip() == "all":
            return frozenset(every)
        if word in ("from", "until", "except"):
            named = _numbers(rest)
            if word != "except" and len(named) != 1:
                raise InputError(f"layers {word!r} takes one number, got {layers!r}")
            _check_layers(named, num_layers, layers)
            if word == "except":
                return frozenset(every) - frozenset(named)
            return frozenset(every[named[0] :] if word == "from" else every[: named[0]])
        if not re.fullmatch(r"[\d\s,-]+", layers):
            raise InputError(
                f'layers are numbers, "all", "from 20", "until 20", "except 20-40" or "0-7,12", got {layers!r}'
            )
        chosen = frozenset(_numbers(layers))
    _check_layers(chosen, num_layers, layers)
    return chosen


def _check_layers(named: Iterable[int], num_layers: int, given: Layers) -> None:
    wrong = sorted(n for n in named if not 0 <= n < num_layers)
    if wrong:
        raise InputError(f"layers {given!r}: the model has layers 0 to {num_layers - 1}, not {wrong[0]}")


def as_rules(knockouts: Knockout | str | Sequence[Knockout | str] | None) -> tuple[Knockout, ...]:
    """Return one, several or no knockouts as a tuple; a text is parsed, as on the command line."""
    several = isinstance(knockouts, Iterable) and not isinstance(knockouts, str)
    given: tuple[Any, ...] = () if knockouts is None else tuple(knockouts) if several else (knockouts,)  # type: ignore[arg-type,assignment]
    rules = tuple(Knockout.parse(one) if isinstance(one, str) else one for one in given)
    for rule in rules:
        if not isinstance(rule, Knockout):
            raise InputError(
                f"a knockout is Knockout(source, target, layers), or a text such as 'image->query@from 4', got {rule!r}"
            )
    return rules


def configurations(
    rules: Sequence[Knockout], layers: str, zero_inputs: bool = False
) -> list[tuple[str, list[Knockout]]]:
    """Return the configurations of a comparison, each a name and its knockouts; the first has no knockout.

    The others are the given rules together, or, without rules, the three configurations of arXiv 2411.17491.
    """
    if rules:
        return [("nothing", []), (" and ".join(str(rule).removesuffix("@all") for rule in rules), list(rules))]
    targets = ("generated", "query", "query+generated")
    three = [Knockout("image", target, layers, zero_inputs) for target in targets]
    return [("nothing", []), *((str(rule).removesuffix("@all"), [rule]) for rule in three)]
