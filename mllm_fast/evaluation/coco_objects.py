"""Read the objects of images and their masks from a file in COCO's format.

Files of other people have odd annotations among good ones. What cannot be used is left out and counted; pycocotools
makes the masks of the rest.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import InputError, check_choice
from ..core.extras import install_command
from ..core.images import stored_orientation, turned
from .samples import Sample, Samples, Thing

ORIENTATIONS = ("auto", "upright", "stored")
_LEAST = 6  # numbers of a polygon
_SHOWN = 5  # ids of annotations that a note names


@dataclass(frozen=True)
class CocoMask:
    """The mask of an annotation.

    Attributes:
        size: The width and height that the file says of the image.
        segmentation: The polygons [x, y, x, y, ...], or COCO's run lengths: {"counts": ..., "size": [height, width]}.
        orientation: The EXIF orientation by which the mask is turned, 1 for none.
    """

    size: tuple[int, int]
    segmentation: Sequence[Sequence[float]] | dict[str, Any]
    orientation: int = 1

    def mask(self) -> np.ndarray:
        """Return the mask of the upright image, bool [height, width].

        Raises:
            InputError: pycocotools is not installed.
        """
        tools = _pycocotools()
        width, height = self.size
        runs: Any = self.segmentation
        if isinstance(runs, dict):
            runs = {**runs, "size": [height, width]}
        if isinstance(runs, list) or isinstance(runs["counts"], list):
            runs = tools.frPyObjects(runs, height, width)
        if isinstance(runs, list):
            runs = tools.merge(runs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of numpy, at pycocotools' own arrays
            pixels = tools.decode(runs)
        return turned(pixels.astype(bool), self.orientation)


def _pycocotools() -> Any:
    try:
        from pycocotools import mask
    except ImportError:
        raise InputError(f"masks in COCO's format need pycocotools: {install_command('coco')}") from None
    return mask


class _Notes:
    """Counts what is odd about annotations."""

    def __init__(self, file: Path):
        self._file, self._ids = file, Counter[str]()
        self._first: dict[str, list[str]] = {}

    def add(self, what: str, note: Any, number: int) -> None:
        """Note an annotation, by its id or else its number in the file."""
        self._ids[what] += 1
        name = note.get("id") if isinstance(note, dict) else None
        first = self._first.setdefault(what, [])
        if len(first) < _SHOWN:
            first.append(f"number {number}" if name is None else str(name))

    def texts(self, total: int) -> tuple[str, ...]:
        return tuple(
            f"{self._file.name}: {count} of {total} annotations {what} ({', '.join(self._first[what])}"
            f"{', ...' if count > _SHOWN else ''})"
            for what, count in self._ids.most_common()
        )


def coco(
    file: Path, pictures: Path, count: int | None = None, empty: bool = False, orientation: str = "auto"
) -> Samples:
    """Read the images that have objects in a file in COCO's format.

    Annotations of an unknown image or category, without a mask, or with a mask that is none are left out; so are
    polygons of fewer than three points. A crowd counts as one object. The samples' notes count each.

    Args:
        file: The file in COCO's format.
        pictures: The folder of the images.
        count: The number of images to take, in order; None takes all.
        empty: Whether to read images without objects, too. The order is then that of the file's images, else that of
            its objects.
        orientation: Where a photo's EXIF data turn it, what the annotations are about: the "upright" image, or the
            "stored" one. "auto" finds out by the width and height that the file says, and where these fit both
            ("upright" photos that are square or upside down) takes the upright one and counts them.

    Raises:
        InputError: The file does not exist, it has another format, or no annotation of it can be used.
    """
    check_choice("orientation", orientation, ORIENTATIONS)
    content = _read(file)
    names = {one["id"]: str(one["name"]) for one in content["categories"] if _has(one, "id", "name")}
    images = {one["id"]: one for one in content["images"] if _has(one, "id", "file_name")}
    found: dict[Any, list[tuple[str, Any]]] = {key: [] for key in images} if empty else {}
    odd, total = _Notes(file), len(content["annotations"])
    for number, note in enumerate(content["annotations"]):
        problem = _problem(note, images, names)
        if problem:
            odd.add(f"left out, {problem}", note, number)
            continue
        area = _usable(note["segmentation"])
        if area != note["segmentation"]:
            odd.add("used without polygons of fewer than three points", note, number)
        if note.get("iscrowd"):
            odd.add("used as one object each, being crowds", note, number)
        found.setdefault(note["image_id"], []).append((names[note["category_id"]], area))
    if not any(found.values()) and not (empty and found):
        raise InputError(f"{file}: no object can be used; " + "; ".join(odd.texts(total) or ("it holds none",)))
    samples, unsure = [], []
    for key in list(found)[:count]:
        sample, told = _sample(images[key], pictures, found[key], orientation)
        samples.append(sample)
        unsure += [] if told else [sample.name]
    notes = odd.texts(total)
    if unsure:
        notes += (
            f"{file.name}: {len(unsure)} of {len(samples)} images turned by EXIF data, of a size that does not tell"
            f" whether their annotations are, and taken as upright ({', '.join(unsure[:_SHOWN])}"
            f"{', ...' if len(unsure) > _SHOWN else ''}); --orientation decides",
        )
    origin = {"coco": str(file), "pictures": str(pictures)}
    if orientation != "auto":
        origin["orientation"] = orientation
    return Samples(samples, origin, notes)


def categories(file: Path) -> list[str]:
    """Return the names of all categories of a file in COCO's format.

    Raises:
        InputError: The file does not exist, or it has another format.
    """
    return [str(one["name"]) for one in _read(file)["categories"] if _has(one, "name")]


def _read(file: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{file}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not in COCO's format ({type(error).__name__} {error})") from None
    for name in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise InputError(f"{file}: not in COCO's format, which has lists of images, annotations and categories")
    return content


def _has(entry: Any, *names: str) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(name), (str, int)) for name in names)


def _problem(note: Any, images: dict[Any, Any], names: dict[Any, str]) -> str:
    """Return why an annotation cannot be used, or ""."""
    if not isinstance(note, dict):
        return "being no object of JSON"
    for key, known, what in (("image_id", images, "image"), ("category_id", names, "category")):
        identity = note.get(key)
        if not isinstance(identity, (str, int)) or identity not in known:
            return f"of no known {what}"
    size = _size(images[note["image_id"]])
    if size is None:
        return "of an image without a width and height"
    area = note.get("segmentation")
    if not area:
        return "without a mask"
    if isinstance(area, list):
        return "" if _usable(area) else "without a polygon of three points or more"
    return "" if _fits(area, size) else "with run lengths that do not fit the image"


def _size(image: dict[str, Any]) -> tuple[int, int] | None:
    size = image.get("width"), image.get("height")
    if all(isinstance(one, (int, float)) and math.isfinite(one) and one >= 1 for one in size):
        return int(size[0]), int(size[1])  # type: ignore[arg-type]
    return None


def _usable(area: Any) -> Any:
    """Return a segmentation without the polygons that are none."""
    if not isinstance(area, list):
        return area
    return [
        one
        for one in area
        if isinstance(one, list)
        and len(one) >= _LEAST
        and len(one) % 2 == 0
        and all(isinstance(number, (int, float)) and math.isfinite(number) for number in one)
    ]


def _fits(area: Any, size: tuple[int, int]) -> bool:
    """Return whether run lengths are those of an image of this size; packed ones are unpacked for it."""
    if not isinstance(area, dict) or area.get("size", [size[1], size[0]]) != [size[1], size[0]]:
        return False
    counts = area.get("counts")
    if isinstance(counts, str):
        try:
            counts = _unpacked(counts)
        except (ValueError, IndexError):
            return False
    if not isinstance(counts, list) or not all(isinstance(one, int) and one >= 0 for one in counts):
        return False
    return sum(counts) == size[0] * size[1]


def _unpacked(text: str) -> list[int]:
    """Decode COCO's packed run lengths, of which pycocotools does not check whether they fit the image.

    Each letter holds a digit of five bits and a bit that says whether more digits follow, least significant first. The
    highest bit of a number's last digit is its sign. From the fourth number on, each is a difference to the number two
    places before it.
    """
    counts: list[int] = []
    number = shift = 0
    for letter in text:
        digit = ord(letter) - 48
        if not 0 <= digit < 64 or shift > 60:
            raise ValueError(f"{letter!r} is no digit of run lengths")
        number |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            number -= 1 << shift
        counts.append(number + counts[-2] if len(counts) > 2 else number)
        number = shift = 0
    if shift:
        raise ValueError("the run lengths end in the middle of a number")
    return counts


def _sample(
    image: dict[str, Any], pictures: Path, found: list[tuple[str, Any]], orientation: str
) -> tuple[Sample, bool]:
    """Return the sample of an image, and whether it is sure how its annotations are turned."""
    name = str(image["file_name"])
    path, size = pictures / name, _size(image)
    turn, problem, sure = 1, "", True
    if found and size is not None and path.is_file():
        turn, problem, sure = _turn(path, size, orientation)
    things = tuple(Thing(one, CocoMask(size, area, turn)) for one, area in found) if size is not None else ()
    return Sample(name, path, things, problem=problem), sure


def _turn(path: Path, size: tuple[int, int], orientation: str) -> tuple[int, str, bool]:
    """Return by which orientation masks are turned, what is wrong with the image's size, and whether that is sure."""
    try:
        stored, exif = stored_orientation(path)
    except InputError as error:
        return 1, str(error), True
    upright = stored[::-1] if exif >= 5 else stored
    fits = {"upright": size == upright, "stored": size == stored}
    if not any(fits.values()):
        return 1, f"{path}: has {upright[0]} x {upright[1]} pixels, its annotations are of {size[0]} x {size[1]}", True
    if exif == 1 or (orientation != "auto" and fits[orientation]):
        return exif if orientation == "stored" else 1, "", True
    if not all(fits.values()):
        return 1 if fits["upright"] else exif, "", True
    return 1, "", False
