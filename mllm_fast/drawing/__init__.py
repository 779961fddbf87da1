"""Pixels: heatmaps over images, boxes, lettering. Nothing here knows an explanation or a model."""
