"""The images of an evaluation, and what is known about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from PIL import Image

from ..core.errors import InputError
from ..core.images import image_files
from ..shapes.clips import Clip
from ..shapes.scenes import Scene, generate_scene

T = TypeVar("T")


class Area(Protocol):
    """An area of an image that can make a mask."""

    def mask(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Thing:
    """An object of an image.

    Attributes:
        name: The name of the object.
        area: The mask, or an `Area` that makes the mask when it is needed.
    """

    name: str
    area: np.ndarray | Area

    @property
    def mask(self) -> np.ndarray:
        """The mask of the object, bool [height, width]."""
        return self.area if isinstance(self.area, np.ndarray) else self.area.mask()


@dataclass(frozen=True)
class YesNo:
    """A yes-or-no question, and whether its answer is yes."""

    text: str
    truth: bool


@dataclass(frozen=True)
class Sample:
    """One image of an evaluation.

    Attributes:
        name: A name that no other sample of the run has.
        source: The file, or the generated scene or clip.
        things: The known objects of the image, or None if nothing is known about them.
        questions: The questions of a benchmark.
        group: The group (task) of the benchmark that the questions belong to.
        events: What is asked about a video, see `videos.Event`.
        problem: The reason why the sample cannot be used, as found when it was read; "" for none.
    """

    name: str
    source: Path | Scene | Clip
    things: tuple[Thing, ...] | None = None
    questions: tuple[YesNo, ...] = ()
    group: str = ""
    events: tuple[Any, ...] = ()
    problem: str = ""

    @property
    def image(self) -> Image.Image | Path:
        """The image, in a form that `VLM.generate` takes."""
        if isinstance(self.source, Clip):
            raise InputError(f"{self.name} is a clip, not an image")
        return self.source.image if isinstance(self.source, Scene) else self.source

    @property
    def scene(self) -> Scene | None:
        """The scene of a generated image, for questions about it; None for a file."""
        return self.source if isinstance(self.source, Scene) else None


@dataclass(frozen=True)
class Samples:
    """A list of samples, their origin as plain JSON, and what was odd about it, a sentence each."""

    list: Sequence[Sample]
    origin: dict[str, Any]
    notes: tuple[str, ...] = ()


def sampled(items: Sequence[T], count: int, seed: int) -> list[T]:
    """Return a random sample without repetition, in the order of the items. A larger one contains a smaller one.

    Raises:
        InputError: `count` is less than 1, or more than the number of items.
    """
    if not 1 <= count <= len(items):
        raise InputError(f"a sample has at least 1 and at most all {len(items)} images that can be used, got {count}")
    return [items[i] for i in sorted(np.random.default_rng(seed).permutation(len(items))[:count].tolist())]


def drawn(samples: Samples, count: int, seed: int) -> Samples:
    """Return a random sample of `count` samples; see `sampled`."""
    return Samples(sampled(samples.list, count, seed), {**samples.origin, "sample": [count, seed]}, samples.notes)


def scenes(count: int, seed: int = 0) -> Samples:
    """Return `count` generated scenes.

    Each scene depends only on `seed` and its number, so a larger `count` begins with the same scenes.
    """
    if count < 1:
        raise InputError(f"the number of scenes is at least 1, got {count}")
    return Samples([_scene(i, seed) for i in range(count)], {"scenes": seed})


def _scene(number: int, seed: int) -> Sample:
    scene = generate_scene(np.random.default_rng([seed, number]))
    return Sample(f"scene {number}", scene, tuple(Thing(f"{o.color} {o.shape}", o.mask) for o in scene.objects))


def pictures(folder: Path, count: int | None = None) -> Samples:
    """Return the first `count` images of a folder and of the folders in it, in the order of their names.

    Raises:
        InputError: The folder does not exist, or there is no image in it.
    """
    found = image_files(folder)
    listed = [Sample(path.relative_to(folder).as_posix(), path) for path in found[:count]]
    return Samples(listed, {"folder": str(folder)})
