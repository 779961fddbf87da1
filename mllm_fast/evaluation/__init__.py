"""Evaluations that reproduce figures of papers on any model and on your own images; see `mllm-fast eval`."""

from .registry import evaluation

__all__ = ["evaluation"]
