"""What the controls of the browser tool say, and its forms outside of the page: links, and what a browser keeps.

A value from a link or from a browser's store is checked as one that the page sends.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import parse_qs, urlencode

from ..core.errors import InputError
from ..explain.registry import DEFAULT

ROUTES = {  # attention that can be knocked out: the source and target of the rule
    "image to question": ("image", "query"),
    "image to answer": ("image", "generated"),
    "question to answer": ("query", "generated"),
}
HOTTEST, LEAST_P = 2.0, 0.05
_MOST_TEXT = 20_000  # characters of a question in a link; longer ones are asked, but not shared
_LAST_WORD = -1


@dataclass(frozen=True)
class Limits:
    """What the controls of one server accept.

    Attributes:
        layers: The number of layers of the model.
        tokens: The longest answer that may be asked for, in tokens.
        usual_tokens: The longest answer unless another length is chosen.
        methods: The names of the heatmap methods.
        joint: Whether there is a joint model.
    """

    layers: int
    tokens: int
    usual_tokens: int
    methods: tuple[str, ...]
    joint: bool


@dataclass(frozen=True)
class Inputs:
    """The values of the controls.

    Attributes:
        question: The question.
        knockout: The keys of `ROUTES` that are knocked out.
        first: The first layer of the knockout.
        last: The last layer of the knockout.
        keep: The share of the image tokens that a context keeps, in percent; 0 makes no context.
        joint: Whether the joint model answers.
        tokens: The longest answer, in tokens.
        temperature: The temperature; 0 takes the likeliest token.
        top_p: The probability mass of the tokens that are sampled from.
        method: The heatmap method.
        word: The index of the word whose map is shown; -1 for the last one.
    """

    question: str
    knockout: tuple[str, ...]
    first: int
    last: int
    keep: float
    joint: bool
    tokens: int
    temperature: float
    top_p: float
    method: str = DEFAULT
    word: int = _LAST_WORD

    @property
    def options(self) -> dict[str, Any]:
        """The options of `VLM.stream` that the controls stand for."""
        if self.temperature == 0:
            return {"max_new_tokens": self.tokens, "do_sample": False}
        sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        return {"max_new_tokens": self.tokens, **sampling}

    @classmethod
    def usual(cls, limits: Limits) -> Inputs:
        """Return the values that the page begins with."""
        tokens = min(limits.usual_tokens, limits.tokens)
        return cls("Describe the image.", (), 0, limits.layers - 1, 0, False, tokens, 0.0, 1.0)

    @classmethod
    def checked(cls, given: Mapping[str, Any], limits: Limits) -> Inputs:
        """Return values that come from outside, such as texts from a link; those that are absent are as usual.

        Args:
            given: The values by the names of the attributes; other names are ignored.
            limits: What is accepted.

        Raises:
            InputError: A value is of a wrong type or out of range.
        """
        usual = vars(cls.usual(limits))
        checks = _checks(limits)
        values = {name: checks[name](given[name]) if name in given else usual[name] for name in usual}
        if values["first"] > values["last"]:
            raise InputError(
                f"the first layer of the knockout is at most the last one, got {values['first']} and {values['last']}"
            )
        return cls(**values)


NAMES = tuple(field.name for field in fields(Inputs))


def query_of(inputs: Inputs, limits: Limits, sample: bool) -> str:
    """Return the query of a link to these values: those that are not as usual.

    Args:
        inputs: The values.
        limits: What the server accepts.
        sample: Whether the image is the sample, which is the only image that a link can name.

    Raises:
        InputError: The question is too long for a link.
    """
    if len(inputs.question) > _MOST_TEXT:
        raise InputError(f"a link holds at most {_MOST_TEXT:,} characters of a question, got {len(inputs.question):,}")
    usual = Inputs.usual(limits)
    found: dict[str, Any] = {"question": inputs.question}
    for name in NAMES[1:]:
        value = getattr(inputs, name)
        if value != getattr(usual, name):
            found[name] = ",".join(value) if name == "knockout" else f"{value:g}" if name != "method" else value
    if sample:
        found["image"] = "sample"
    return "?" + urlencode(found)


def of_query(query: str) -> tuple[dict[str, str], bool]:
    """Return the values that a link names, not checked yet, and whether it names the sample image."""
    found = {name: values[-1] for name, values in parse_qs(query.removeprefix("?"), keep_blank_values=True).items()}
    return {name: text for name, text in found.items() if name in NAMES}, found.get("image") == "sample"


def of_store(text: str | None) -> dict[str, Any]:
    """Return the values that a browser kept, not checked yet; none if it kept no JSON object."""
    try:
        found = json.loads(text or "")
    except (ValueError, RecursionError):
        return {}
    return {name: value for name, value in found.items() if name in NAMES} if isinstance(found, dict) else {}


def _checks(limits: Limits) -> dict[str, Callable[[Any], Any]]:
    last = limits.layers - 1
    return {
        "question": _text,
        "knockout": _routes,
        "first": _number("the first layer of the knockout", 0, last, whole=True),
        "last": _number("the last layer of the knockout", 0, last, whole=True),
        "keep": _number("the share of image tokens, in percent,", 0, 100),
        "joint": lambda value: _switch(value, limits.joint),
        "tokens": _number("the longest answer in tokens", 1, limits.tokens, whole=True),
        "temperature": _number("the temperature", 0, HOTTEST),
        "top_p": _number("top-p", LEAST_P, 1),
        "method": lambda value: _method(value, limits.methods),
        "word": _number("the number of the word", _LAST_WORD, 1_000_000, whole=True),
    }


def _number(what: str, least: float, most: float, whole: bool = False) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        try:
            number = float(value) if isinstance(value, (str, int, float)) and len(str(value)) < 40 else math.nan
        except ValueError:
            number = math.nan
        if not least <= number <= most or (whole and number != int(number)):
            kind = "a whole number" if whole else "a number"
            raise InputError(f"{what} is {kind} from {least:g} to {most:g}, got {_shown(value)}")
        return int(number) if whole else number

    return check


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"the question is a text, got {_shown(value)}")
    return value


def _routes(value: Any) -> tuple[str, ...]:
    found = [one for one in value.split(",") if one] if isinstance(value, str) else value
    if not isinstance(found, (list, tuple)) or not all(isinstance(one, str) and one in ROUTES for one in found):
        raise InputError(f"what is knocked out is any of {', '.join(ROUTES)}; got {_shown(value)}")
    return tuple(route for route in ROUTES if route in found)


def _switch(value: Any, possible: bool) -> bool:
    if value not in (True, False, "1", "0"):
        raise InputError(f"joint is 1 or 0, got {_shown(value)}")
    found = value in (True, "1")
    if found and not possible:
        raise InputError("this server has no joint model; it is started with one by --joint")
    return found


def _method(value: Any, methods: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in methods:
        raise InputError(f"the map is one of {', '.join(methods)}; got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
