"""An image read once: its attended tokens kept, stored and asked again."""

from .registry import pruning_score

__all__ = ["pruning_score"]
