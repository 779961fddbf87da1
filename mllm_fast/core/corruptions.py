"""Corrupted images, which make a model see what is not there and test how far it can be trusted."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from .errors import check_choice

KINDS = ("blur", "noise", "occlusion")


def degrade(image: Image.Image, kind: str, strength: float, rng: np.random.Generator) -> Image.Image:
    """Return an RGB image that is corrupted with a given strength.

    Args:
        image: An RGB image.
        kind: "blur", a Gaussian blur with a radius of up to 6 % of the shorter side; "noise", Gaussian noise of up to
            100 of 255 in every channel; or "occlusion", grey squares over up to 60 % of the image.
        strength: 0 (unchanged) to 1.
        rng: The random number generator.
    """
    check_choice("kind", kind, KINDS)
    if strength <= 0:
        return image
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(0.06 * min(image.size) * strength))
    pixels = np.asarray(image)
    if kind == "noise":
        noisy = pixels + rng.standard_normal(pixels.shape, np.float32) * np.float32(100 * strength)
        return Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))
    height, width = pixels.shape[:2]
    side = max(1, min(height, width) // 6)
    hidden = np.zeros((height, width), bool)
    while hidden.mean() < 0.6 * strength:
        top, left = rng.integers(1 - side, height), rng.integers(1 - side, width)
        hidden[max(top, 0) : top + side, max(left, 0) : left + side] = True
    return Image.fromarray(np.where(hidden[..., None], np.uint8(128), pixels))
