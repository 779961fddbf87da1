"""The papers' figures as commands, on any model and on your own images; see `mllm-fast eval`."""

from .registry import evaluation

__all__ = ["evaluation"]
