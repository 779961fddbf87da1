"""Pruning scores: named functions that decide which image tokens a context keeps."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.errors import check_choice
from ..core.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.layout import TokenLayout

OBSERVED = ("", "query", "generated")
_RENAMED = {"norm": "key_norm"}  # an old name works until 0.3


@dataclass(frozen=True)
class Prefix:
    """A prompt as the model read it, the input of a pruning score.

    Attributes:
        keys: the keys of the whole prompt, one tensor [Hkv, N, D] per layer, on the layer's device.
        values: the values of the whole prompt, one tensor [Hkv, N, D] per layer.
        layout: the prompt's segments and images.
        attention_mass: the attention that each token receives from the observed rows, float32 [L, N], averaged over
            heads and rows. None if the score observes no rows.
        seed: the seed for scores that draw random numbers.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    layout: TokenLayout
    attention_mass: Tensor | None
    seed: int = 0


@dataclass(frozen=True)
class PruningScore:
    """One way to rank image tokens.

    Attributes:
        name: the name, as in `VLM.compress(score=...)` and `--score`.
        meaning: why a token is kept, in a few words.
        score: the function, Prefix -> [L, N].
        observes: the rows whose attention is summed while the prompt is read: "query", "generated" (the model's answer
            to the prompt) or "" (none).
    """

    name: str
    meaning: str
    score: Callable[[Prefix], Tensor]
    observes: str = ""


PRUNING_SCORES: Registry[PruningScore] = Registry(
    "pruning score",
    "mllm_fast.pruning_scores",
    dict.fromkeys(("generated", "query", "key_norm", "random"), "mllm_fast.context.scores"),
)


def pruning_score(
    name: str, meaning: str, *, observes: str = ""
) -> Callable[[Callable[[Prefix], Tensor]], Callable[[Prefix], Tensor]]:
    """Register a function as a pruning score; use it as a decorator.

    The function takes a `Prefix` and returns one number per layer and token, [L, N]. In each layer the image tokens
    with the largest numbers are kept. The numbers of other tokens do not matter.

    An installed package can register a score by an entry point of the group "mllm_fast.pruning_scores" that has the
    score's name.

    Args:
        name: the score's name, of lower-case letters, digits, "-" and "_".
        meaning: why a token is kept, in a few words.
        observes: "query" or "generated", if the function needs `Prefix.attention_mass`. With "generated" the model
            answers the prompt first.

    Raises:
        InputError: the name is taken or malformed, or `observes` is unknown.
    """
    check_choice("observes", observes, OBSERVED)

    def register(function: Callable[[Prefix], Tensor]) -> Callable[[Prefix], Tensor]:
        PRUNING_SCORES.register(name, PruningScore(name, meaning, function, observes), function.__module__)
        return function

    return register


def score_name(name: str) -> str:
    """Return the name of a registered pruning score; an old name is replaced by the new one, with a warning.

    Raises:
        InputError: there is no such score.
    """
    if name in _RENAMED:
        warnings.warn(f"score={name!r} is called {_RENAMED[name]!r} now", DeprecationWarning, stacklevel=3)
        name = _RENAMED[name]
    check_choice("score", name, PRUNING_SCORES.names())
    return name
