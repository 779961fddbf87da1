"""Heatmap methods: named functions that say how far a generated token depends on each image token."""

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
    """One way to compute a heatmap.

    Attributes:
        name: the name, as in `Explanation.heatmap(method=...)` and `--method`.
        meaning: what the numbers mean, in a few words, for captions.
        attribution: the function, (scores, token, image, heads) -> [n].
        needs_rerun: whether it runs the model again, which is not possible for explanations by a stream or a context.
        needs_detector: whether it works only for explanations by a joint model.
        takes_heads: whether its map depends on `heads`; otherwise a token has one map for all heads and layers.
        every_position: whether the function returns a number for every position, [positions], of which each image takes
            its own.
    """

    name: str
    meaning: str
    attribution: Callable[[Any, int, Any, Heads], Tensor]
    needs_rerun: bool = False
    needs_detector: bool = False
    takes_heads: bool = True
    every_position: bool = False


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
    name: str,
    meaning: str,
    *,
    needs_rerun: bool = False,
    needs_detector: bool = False,
    takes_heads: bool = True,
    every_position: bool = False,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a function as a heatmap method; use it as a decorator.

    The function takes (scores, token, image, heads): a `Scores` (every `Explanation` is one), the token's index, the
    image's `ImageLayout`, and the caller's `heads`. It returns one number per image token, [n], in the order of
    `image.positions`. A larger number means that the token depends more on that part of the image.

    An installed package can register a method by an entry point of the group "mllm_fast.heatmaps" that has the method's
    name.

    Args:
        name: the method's name, of lower-case letters, digits, "-" and "_".
        meaning: what the numbers mean, in a few words, for captions.
        needs_rerun: whether it runs the model again, through `scores.replay`.
        needs_detector: whether it works only for explanations by a joint model.
        takes_heads: whether its map depends on `heads`.
        every_position: whether the function returns a number for every position up to the token's row, whichever image
            it is given. It is then called once for all images of a prompt and all moments of a video.

    Raises:
        InputError: the name is taken or malformed.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        method = HeatmapMethod(name, meaning, function, needs_rerun, needs_detector, takes_heads, every_position)
        HEATMAP_METHODS.register(name, method, function.__module__)
        return function

    return register


def methods_without_detector() -> tuple[str, ...]:
    """Return the names of the methods that can explain an answer of any model."""
    return tuple(name for name in HEATMAP_METHODS if not HEATMAP_METHODS.get(name).needs_detector)


def map_name(method: str, heads: Heads = 10) -> str:
    """Return the name of a map in words, for verdicts and table columns."""
    if method != DEFAULT:
        return f"map {method!r}"
    if isinstance(heads, int):
        return f"log-probability map of the {heads} best heads"
    if heads == "all":
        return "log-probability map of all heads"
    named = ", ".join(f"{layer}.{head}" for layer, head in heads[:3])  # type: ignore[str-unpack]
    return f"log-probability map of {'head' if len(heads) == 1 else 'heads'} {named}{', ...' if len(heads) > 3 else ''}"
