"""The images of an evaluation, and what is known of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ..core.errors import InputError
from ..core.images import image_files
from ..shapes.scenes import Scene, generate_scene


class Area(Protocol):
    """What a mask can be made of."""

    def mask(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Thing:
    """An object of an image: its name, and its mask or what one is made of when it is needed."""

    name: str
    area: np.ndarray | Area

    @property
    def mask(self) -> np.ndarray:
        """bool [height, width]."""
        return self.area if isinstance(self.area, np.ndarray) else self.area.mask()


@dataclass(frozen=True)
class YesNo:
    """A question, and whether its answer is yes."""

    text: str
    truth: bool


@dataclass(frozen=True)
class Sample:
    """One image. `name` tells it from the others of a run; `source`: the file, or the generated scene; `things`: the
    objects that are known, None where nothing is known of them; `questions`: of a benchmark, and the `group` (task)
    they belong to; `problem`: why it cannot be used, as far as its reader saw."""

    name: str
    source: Path | Scene
    things: tuple[Thing, ...] | None = None
    questions: tuple[YesNo, ...] = ()
    group: str = ""
    problem: str = ""

    @property
    def image(self) -> Image.Image | Path:
        """As `VLM.generate` takes it."""
        return self.source.image if isinstance(self.source, Scene) else self.source

    @property
    def scene(self) -> Scene | None:
        """Of a generated image, for questions about it."""
        return self.source if isinstance(self.source, Scene) else None


@dataclass(frozen=True)
class Samples:
    """Samples, and where they come from, in plain JSON."""

    list: Sequence[Sample]
    origin: dict[str, Any]


def scenes(count: int, seed: int = 0) -> Samples:
    """Generated scenes; each depends on `seed` and its number alone, so that more of them begin with the same ones."""
    if count < 1:
        raise InputError(f"the number of scenes is at least 1, got {count}")
    return Samples([_scene(i, seed) for i in range(count)], {"scenes": seed})


def _scene(number: int, seed: int) -> Sample:
    scene = generate_scene(np.random.default_rng([seed, number]))
    return Sample(f"scene {number}", scene, tuple(Thing(f"{o.color} {o.shape}", o.mask) for o in scene.objects))


def pictures(folder: Path, count: int | None = None) -> Samples:
    """The images of a folder and of the folders in it, by name; the first `count` of them.

    Raises:
        InputError: no folder, or no image in it.
    """
    found = image_files(folder)
    listed = [Sample(path.relative_to(folder).as_posix(), path) for path in found[:count]]
    return Samples(listed, {"folder": str(folder)})
