"""Drawing of heatmaps over images, boxes and text. Nothing here depends on an explanation or a model."""
