"""Read the objects of images and their masks from a file in COCO's format or from a folder of PNGs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, UnidentifiedImageError

from ..core.errors import InputError
from ..core.images import ENDINGS
from .samples import Sample, Samples, Thing


@dataclass(frozen=True)
class Polygons:
    """A COCO segmentation made of polygons.

    Attributes:
        size: The width and height of the image.
        polygons: The corners of each polygon, x, y, x, y, ...
    """

    size: tuple[int, int]
    polygons: Sequence[Sequence[float]]

    def mask(self) -> np.ndarray:
        image = Image.new("1", self.size)
        draw = ImageDraw.Draw(image)
        for polygon in self.polygons:
            draw.polygon(list(polygon), fill=1, outline=1)
        return np.array(image)


@dataclass(frozen=True)
class Runs:
    """A COCO segmentation made of run lengths.

    Attributes:
        size: The width and height of the image.
        counts: The run lengths, column by column. Runs are outside and inside the object in turn.
    """

    size: tuple[int, int]
    counts: Sequence[int]

    def mask(self) -> np.ndarray:
        width, height = self.size
        inside = np.arange(len(self.counts)) % 2 == 1
        return np.repeat(inside, self.counts).reshape(width, height).T


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


def coco(file: Path, pictures: Path, count: int | None = None, empty: bool = False) -> Samples:
    """Read the images that have objects in a file in COCO's format.

    Args:
        file: The file in COCO's format.
        pictures: The folder of the images.
        count: The number of images to take, in order; None takes all.
        empty: Whether to read images without objects, too. The order is then that of the file's images, else that of
            its objects.

    Raises:
        InputError: The file does not exist, or it has another format.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        names = {category["id"]: str(category["name"]) for category in content["categories"]}
        images = {image["id"]: image for image in content["images"]}
        things: dict[Any, list[Thing]] = {key: [] for key in images} if empty else {}
        for note in content["annotations"]:
            image = images[note["image_id"]]
            size = int(image["width"]), int(image["height"])
            area = _area(note["segmentation"], size)
            things.setdefault(note["image_id"], []).append(Thing(names[note["category_id"]], area))
        listed = [
            Sample(str(images[key]["file_name"]), pictures / images[key]["file_name"], tuple(found))
            for key, found in things.items()
        ]
    except FileNotFoundError:
        raise InputError(f"{file}: there is no such file") from None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{file}: not in COCO's format ({type(error).__name__} {error})") from None
    if not listed:
        raise InputError(f"{file}: holds no object")
    return Samples(listed[:count], {"coco": str(file), "pictures": str(pictures)})


def categories(file: Path) -> list[str]:
    """Return the names of all categories of a file in COCO's format.

    Raises:
        InputError: The file does not exist, or it has another format.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return [str(category["name"]) for category in content["categories"]]
    except FileNotFoundError:
        raise InputError(f"{file}: there is no such file") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not in COCO's format ({type(error).__name__} {error})") from None


def _area(segmentation: Any, size: tuple[int, int]) -> Polygons | Runs:
    if isinstance(segmentation, list):
        polygons = [[float(number) for number in polygon] for polygon in segmentation]
        if any(len(polygon) < 6 or len(polygon) % 2 for polygon in polygons):
            raise ValueError("a polygon has three points or more")
        return Polygons(size, polygons)
    counts = segmentation["counts"]
    runs = _unpacked(counts) if isinstance(counts, str) else [int(number) for number in counts]
    if sum(runs) != size[0] * size[1] or min(runs) < 0:
        raise ValueError(f"the runs of a mask sum to {sum(runs)}, its image has {size[0]} x {size[1]} pixels")
    return Runs(size, runs)


def _unpacked(text: str) -> list[int]:
    """Decode COCO's compressed run lengths.

    Each letter holds a digit of five bits and a bit that says whether more digits follow, least significant first. The
    highest bit of a number's last digit is its sign. From the fourth number on, each is a difference to the number two
    places before it.
    """
    counts: list[int] = []
    number = shift = 0
    for letter in text:
        digit = ord(letter) - 48
        number |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            number -= 1 << shift
        counts.append(number + counts[-2] if len(counts) > 2 else number)
        number = shift = 0
    return counts


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
