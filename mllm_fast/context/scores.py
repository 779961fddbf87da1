"""The pruning scores that come with the package, and the number of tokens that a context keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.errors import InputError, check_choice
from ..core.layout import TokenLayout
from ..core.split import Split
from .registry import Prefix, pruning_score

PARTS = ("query+image", "query", "image")
BUDGETS = ("all", "frame")


@pruning_score("generated", "attention of the model's answer to the prompt (arXiv 2411.17491)", observes="generated")
@pruning_score("query", "attention of the prompt itself, which needs no answer", observes="query")
def attention_mass(prefix: Prefix) -> Tensor:
    """Return the observed attention mass."""
    assert prefix.attention_mass is not None
    return prefix.attention_mass


@pruning_score("key_norm", "small keys, which draw most attention (Devoto et al. 2024, arXiv 2406.11430)")
def key_norm(prefix: Prefix) -> Tensor:
    """Return minus the L2 norm of each key, averaged over heads."""
    return torch.stack([-keys.float().norm(dim=-1).mean(0).to(prefix.keys[0].device) for keys in prefix.keys])


@pruning_score("random", "chance, to compare with")
def random(prefix: Prefix) -> Tensor:
    """Return uniform random numbers drawn with the prefix's seed."""
    generator = torch.Generator().manual_seed(prefix.seed)
    return torch.rand(len(prefix.keys), prefix.layout.length, generator=generator)


class AttendedTokens:
    """Sums the attention mass that each prompt token receives, over heads and over the rows that a score counts."""

    def __init__(self, layout: TokenLayout, score: str, num_sites: int, split: Split | None = None):
        self._split = split
        self._length = layout.prompt_length
        self._generated = score == "generated"
        self._query = torch.zeros(self._length, dtype=torch.bool)
        self._query[layout.positions("query")] = True
        self._sum = [torch.zeros(self._length) for _ in range(num_sites)]
        self._rows = [0] * num_sites
        self._counted = 0

    def wants(self, first_row: int, rows: int) -> bool | Tensor:
        """See `AttentionObserver.wants`."""
        self._counted = 1
        if self._generated or first_row >= self._length:
            return self._generated and first_row >= self._length
        chosen = self._query[first_row : first_row + rows]
        self._counted = int(chosen.sum())
        return chosen[None] if self._counted else False

    def add(self, site: int, mass: Tensor) -> None:
        """See `AttentionObserver.add`; `mass` [1, H, N] is the mean over the counted rows of the forward pass."""
        # the sum moves once: copying the mass to the CPU at each token would wait for the GPU
        here = self._sum[site].to(mass.device)
        self._sum[site] = here + self._counted * mass[0, :, : self._length].float().mean(0)
        self._rows[site] += self._counted

    def add_outside(self, layer: int, mass: Tensor) -> None:
        """Refuse a model with cross-attention, whose image keys are no tokens of the prompt."""
        raise InputError(
            "a model with cross-attention keeps its image outside the sequence, so it cannot be compressed"
        )

    def mean(self) -> Tensor | None:
        """Return the mean over heads and counted rows, float32 [S, N]; None if a site has no counted row."""
        if not all(self._rows):
            return None
        sums = self._sum
        if self._split is not None:  # every process has the mean of its own heads
            sums = list(self._split.mean(torch.stack(sums)))
        return torch.stack([total.cpu() / rows for total, rows in zip(sums, self._rows, strict=True)])


def check_budget(budget: str) -> None:
    """Raise InputError for a budget that is none of `BUDGETS`."""
    check_choice("budget", budget, BUDGETS)


def counts_of_images(keep: float | int, layout: TokenLayout, budget: str) -> list[int] | None:
    """Return how many tokens of each image, or moment of a video, are kept; None if they share one budget."""
    if budget == "all":
        return None
    return [kept_count(keep, len(image.positions)) for image in layout.images]


def count_of(keep: float | int, layout: TokenLayout, budget: str = "all") -> int:
    """Return how many image tokens of a prompt are kept in a layer."""
    each = counts_of_images(keep, layout, budget)
    return kept_count(keep, len(layout.positions("image"))) if each is None else sum(each)


def within_each(scored: Tensor, layout: TokenLayout, counts: Sequence[int]) -> Tensor:
    """Return scores by which as many tokens of each image are the highest of all as `counts` says.

    Args:
        scored: The scores of all tokens, float32 [S, N].
        layout: The layout of the prompt.
        counts: How many tokens of each image are kept.
    """
    made = torch.zeros_like(scored)
    for image, count in zip(layout.images, counts, strict=True):
        mine = scored[:, image.positions]
        best = mine.argsort(dim=1, descending=True, stable=True)[:, :count]
        made[:, image.positions] = torch.zeros_like(mine).scatter_(1, best, 1.0)
    return made


def kept_count(keep: float | int, total: int) -> int:
    """Return how many of `total` tokens `keep` stands for.

    An int is a count. A float is a share of the tokens, and the result is rounded up.

    Raises:
        InputError: `keep` is no number or out of range.
    """
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise InputError(f"keep is a share between 0 and 1 (0.05), or a count of tokens (29), got {keep!r}")
    if isinstance(keep, int):
        if not 1 <= keep <= total:
            most = "at least 1" if keep < 1 else f"1 to the image's {total} tokens"
            raise InputError(f"keep, as a count, is {most}, got {keep}")
        return keep
    if not 0 < keep <= 1:  # NaN too
        raise InputError(f"keep, as a share, is above 0 and at most 1.0, got {keep}")
    return max(1, math.ceil(round(keep * total, 9)))
