"""The exhaustive causal explanation: every patch knocked out in turn, as many forward passes as there are patches. What
a patch alone is worth to the word, and so the yardstick of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..verify import log_probs

if TYPE_CHECKING:
    from ...core.layout import ImageLayout
    from ..explanation import Explanation, Heads


def image_values(ex: Explanation, token: int, image: ImageLayout, heads: Heads) -> Tensor:
    """How much log p(token) falls, in nats, when the patch is closed to query and generated tokens: float32 [n]."""
    positions = image.positions
    logs = log_probs(ex, token, [positions[:0], *positions[:, None]])
    return logs[0] - logs[1:]
