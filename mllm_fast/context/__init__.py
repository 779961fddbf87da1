"""Contexts: read an image once, keep the tokens that were attended to, store them and ask about them again."""

from .registry import pruning_score

__all__ = ["pruning_score"]
