"""The joint model: a detector (OWL-ViT) and a vision-language model that share one vision embedding.

The shared embedding ties words, boxes, hallucinations and biases together (arXiv 2405.14612).
"""

from .alignment import Alignment, AlignmentConfig
from .detector import Boxes, Detection, Detector, Vision
from .model import JointModel, Seen
from .reverse import ReverseJoint

__all__ = [
    "Alignment",
    "AlignmentConfig",
    "Boxes",
    "Detection",
    "Detector",
    "JointModel",
    "ReverseJoint",
    "Seen",
    "Vision",
]
