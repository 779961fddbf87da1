"""Why a token was said: scores of heads and patches, heatmaps, their causal check, the logit lens."""

from .registry import heatmap_method

__all__ = ["heatmap_method"]
