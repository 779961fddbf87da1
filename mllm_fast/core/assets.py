"""Paths of the files in the package: the embedded models and the sample image."""

from __future__ import annotations

from pathlib import Path

EMBEDDED = "shapes"  # what the embedded models are called
EMBEDDED_VIDEO = "clips"  # what the embedded model for videos is called
_SHAPES = Path(__file__).parent.parent / "shapes"
SAMPLE = _SHAPES / "sample.png"
SAMPLE_VIDEO = _SHAPES / "sample_clip.webp"
SHAPES_WEIGHTS = _SHAPES / "weights"
CLIPS_WEIGHTS = _SHAPES / "clip_weights"
SHAPES_JOINT = _SHAPES / "joint"
