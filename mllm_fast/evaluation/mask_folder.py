"""Read the objects of images and their masks from a folder of PNGs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..core.errors import InputError
from ..core.images import ENDINGS
from .samples import Sample, Samples, Thing


@dataclass(frozen=True)
class MaskFile:
    """A mask in an image file. The pixels that are not black belong to the object."""

    path: Path

    def mask(self) -> np.ndarray:
        try:
            with Image.open(self.path) as image:
                return np.array(image.convert("L")) > 0
        except UnidentifiedImageError:
            raise InputError(f"{self.path}: is no image") from None


def mask_folder(folder: Path, pictures: Path, count: int | None = None) -> Samples:
    """Read the images that have a folder of masks.

    Args:
        folder: The folder of the masks. It holds a folder for each image, with the image's name without the ending. In
            it is one PNG for each object, with the object's name: "dog.png", or "dog 1.png" and "dog 2.png" for two.
        pictures: The folder of the images.
        count: The number of images to take, in order; None takes all.

    Raises:
        InputError: A folder does not exist, or no image has a folder of masks.
    """
    for place in (folder, pictures):
        if not place.is_dir():
            raise InputError(f"{place}: is no folder")
    listed = []
    for picture in sorted(path for path in pictures.iterdir() if path.suffix.lower() in ENDINGS):
        masks = sorted((folder / picture.stem).glob("*.png"))
        if masks:
            things = tuple(Thing(mask.stem.rstrip("0123456789").strip(), MaskFile(mask)) for mask in masks)
            listed.append(Sample(picture.name, picture, things))
    if not listed:
        raise InputError(f"{folder}: no folder there is called like an image of {pictures} and holds .png files")
    return Samples(listed[:count], {"masks": str(folder), "pictures": str(pictures)})
