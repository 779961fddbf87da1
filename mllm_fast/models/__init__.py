"""What differs between architectures: where a model keeps its parts, how its processor cuts an image into tokens."""
