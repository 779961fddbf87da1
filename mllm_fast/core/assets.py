"""Paths of the files in the package: the embedded models and the sample image."""

from __future__ import annotations

from pathlib import Path

EMBEDDED = "shapes"  # what the embedded models are called
_SHAPES = Path(__file__).parent.parent / "shapes"
SAMPLE = _SHAPES / "sample.png"
SHAPES_WEIGHTS = _SHAPES / "weights"
SHAPES_JOINT = _SHAPES / "joint"
