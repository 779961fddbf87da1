"""The verdict of a causal check of a heatmap."""

from __future__ import annotations

from dataclasses import dataclass

from .registry import DEFAULT, Heads, map_name

_MOVED = 0.01  # nats


@dataclass(frozen=True)
class Verification:
    """Changes of log p(token) when patches are knocked out, one a variant.

    token: its index. log_prob: with all patches. count: patches knocked out, of the image tokens' number `of`. top,
    lowest: the change for the map's highest and lowest patches; random: for as many random ones, several times. method,
    heads: of the map that was checked, as in `Explanation.heatmap`; the verdict is about no other map.
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

    @property
    def moved(self) -> bool:
        """Whether any of the variants changed log p(token) by a hundredth of a nat or more."""
        return max(abs(change) for change in (self.top, self.lowest, *self.random)) >= _MOVED

    @property
    def passed(self) -> bool:
        """True if the highest patches hurt the word, and more than the lowest and every random set did."""
        return self.moved and self.top < min(0.0, self.lowest, *self.random)

    @property
    def verdict(self) -> str:
        """ "holds", "fails", or "open": no set of patches moves the word, so the map cannot be told right or wrong."""
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
    """A change of log p as how much it falls, without a minus before zero."""
    return f"{round(0.0 - change, 2) + 0.0:.2f}"
