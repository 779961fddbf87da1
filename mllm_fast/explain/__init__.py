"""Explanations of generated tokens: scores of heads and patches, heatmaps, causal checks and the logit lens."""

from .registry import heatmap_method

__all__ = ["heatmap_method"]
