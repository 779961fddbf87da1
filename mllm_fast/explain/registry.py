"""Heatmap methods: ways to say which image tokens a generated token depends on, each registered under a name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT = "logprob"
ALIGNMENT = "gradient-alignment"
Heads = int | str | Sequence[tuple[int, int]]


@dataclass(frozen=True)
class HeatmapMethod:
    """One way to draw a heatmap.

    Attributes:
        name: as in `Explanation.heatmap(method=...)` and `--method`.
        meaning: what its numbers are, in a few words, for captions.
        attribution: the function, (scores, token, image, heads) -> [n].
        needs_rerun: whether it runs the model again, which explanations by a stream or a context do not allow.
        needs_detector: whether it is for explanations by a joint model alone.
    """

    name: str
    meaning: str
    attribution: Callable[[Any, int, Any, Heads], Tensor]
    needs_rerun: bool = False
    needs_detector: bool = False


HEATMAP_METHODS: Registry[HeatmapMethod] = Registry(
    "heatmap method",
    "mllm_fast.heatmaps",
    {
        name: f"mllm_fast.explain.methods.{module}"
        for name, module in (
            (DEFAULT, "logprob_increase"),
            ("attention", "mean_attention"),
            ("rollout", "rollout"),
            ("relevancy", "relevancy"),
            ("tam", "tam"),
            ("gradient-input", "gradient_x_input"),
            ("random", "random_baseline"),
            ("exhaustive", "occlusion"),
            (ALIGNMENT, "gradient_alignment"),
        )
    },
)


def heatmap_method(
    name: str, meaning: str, *, needs_rerun: bool = False, needs_detector: bool = False
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a function as a heatmap method, as a decorator.

    The function takes (scores, token, image, heads): a `Scores` (every `Explanation` is one), the token's index, the
    image's `ImageLayout`, and what the caller gave as `heads`. It returns one number an image token, [n], in the order
    of `image.positions`; a larger number means that the token depends more on that part of the image.

    An installed package registers one by an entry point of the group "mllm_fast.heatmaps" whose name is the method's.

    Args:
        name: lower-case letters, digits, "-" and "_".
        meaning: what the numbers are, in a few words, for captions.
        needs_rerun: it runs the model again, through `scores.replay`.
        needs_detector: it is for explanations by a joint model alone.

    Raises:
        InputError: the name is taken or malformed.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        method = HeatmapMethod(name, meaning, function, needs_rerun, needs_detector)
        HEATMAP_METHODS.register(name, method, function.__module__)
        return function

    return register


def methods_without_detector() -> tuple[str, ...]:
    """The names of the methods that explain an answer of any model."""
    return tuple(name for name in HEATMAP_METHODS if not HEATMAP_METHODS.get(name).needs_detector)


def map_name(method: str, heads: Heads = 10) -> str:
    """A map in words, as a verdict or a column names it."""
    if method != DEFAULT:
        return f"map {method!r}"
    if isinstance(heads, int):
        return f"log-probability map of the {heads} best heads"
    if heads == "all":
        return "log-probability map of all heads"
    named = ", ".join(f"{layer}.{head}" for layer, head in heads[:3])  # type: ignore[str-unpack]
    return f"log-probability map of {'head' if len(heads) == 1 else 'heads'} {named}{', ...' if len(heads) > 3 else ''}"
