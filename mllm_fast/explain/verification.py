"""The result of a causal check of a heatmap."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.notebook import Displayed, table
from .registry import DEFAULT, Heads, map_name

_MOVED = 0.01  # smallest change that counts, in nats


@dataclass(frozen=True)
class Verification(Displayed):
    """The changes of log p(token) when sets of patches are knocked out.

    Attributes:
        token: the token's index.
        log_prob: log p(token) with all patches.
        count: how many patches are knocked out.
        of: how many image tokens there are.
        top: the change without the map's highest patches.
        lowest: the change without the map's lowest patches.
        random: the changes without as many random patches, one per random set.
        method: the method of the checked map, as in `Explanation.heatmap`. The verdict holds for no other map.
        heads: the heads of the checked map, as in `Explanation.heatmap`.
    """

    token: int
    log_prob: float
    count: int
    of: int
    top: float
    lowest: float
    random: tuple[float, ...]
    method: str = DEFAULT
    heads: Heads = 10

    def _repr_html_(self) -> str:
        mean = sum(self.random) / len(self.random)
        rows = [("highest", self.top), ("random, mean", mean), ("random, least", min(self.random))]
        named = f"{self.count} of {self.of} patches knocked out", "change of log p"
        return table([*rows, ("lowest", self.lowest), ("verdict", self.verdict)], named)

    @property
    def moved(self) -> bool:
        """Whether any set of patches changes log p(token) by at least 0.01 nats."""
        return max(abs(change) for change in (self.top, self.lowest, *self.random)) >= _MOVED

    @property
    def passed(self) -> bool:
        """Whether the map passes the check.

        Removing the highest patches must lower log p(token), and by more than removing the lowest or any random
        patches.
        """
        return self.moved and self.top < min(0.0, self.lowest, *self.random)

    @property
    def verdict(self) -> str:
        """The verdict: "holds", "fails" or "open".

        It is "open" if no set of patches changes the word's probability, so that the map can be called neither right
        nor wrong.
        """
        return "open" if not self.moved else "holds" if self.passed else "fails"

    def __str__(self) -> str:
        mean = sum(self.random) / len(self.random)
        meaning = {
            "holds": "the map holds",
            "fails": "THE MAP FAILS, other patches matter as much",
            "open": "no small set of patches moves this word",
        }
        return (
            f"without its {self.count} highest of {self.of} patches log p falls by {fall(self.top)}, without random"
            f" ones by {fall(mean)} (at most {fall(min(self.random))}), without the lowest by"
            f" {fall(self.lowest)}: {meaning[self.verdict]}"
            f" ({map_name(self.method, self.heads)})"
        )


def fall(change: float) -> str:
    """Return a change of log p as text that says by how much it falls, without a minus sign before zero."""
    return f"{round(0.0 - change, 2) + 0.0:.2f}"
