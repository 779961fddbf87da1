"""The differences between architectures: where a model keeps its parts, and how its processor lays out an image."""

from .adapter import Adapter
from .architectures import architecture

__all__ = ["Adapter", "architecture"]
