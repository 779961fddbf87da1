"""Generated clips of coloured shapes that appear, move and change their colour, with the mask of every object.

The generator is the ground truth of the embedded video model, as `scenes` is that of the embedded model. A seed always
gives the same clip.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .scenes import SHAPES, draw_background, draw_color, draw_noise, shape_coverage

CANVAS = 64  # pixels a side
FRAMES = (4, 8)  # fewest and most frames
FPS = 2.0  # frames a second
EVENTS = ("turns", "moves", "appears", "still")
_SHARES = (0.3, 0.3, 0.3, 0.1)  # how often each happens to an object
_SIZES = (16, 22)  # smallest and largest object, pixels across
_PATH = 22  # fewest pixels that a moving object moves
_MAX_OBJECTS = 3
_TRIES = 60  # places that are tried for an object before the clip is begun anew


@dataclass(frozen=True, eq=False)
class ClipObject:
    """One object of a clip.

    Attributes:
        shape: The shape, one of `SHAPES`.
        colors: The colour in each frame.
        masks: The pixels of the object in each frame, bool [frames, 64, 64]; none in a frame before it appears.
        event: What happens to it, one of `EVENTS`.
        at: The first frame of its new colour or of its appearance; 0 for the other events.
    """

    shape: str
    colors: tuple[str, ...]
    masks: np.ndarray
    event: str
    at: int = 0


@dataclass(frozen=True, eq=False)
class Clip:
    """A clip with its ground truth.

    Attributes:
        pixels: The frames, uint8 [frames, 64, 64, 3].
        objects: The objects, from left to right in the last frame.
    """

    pixels: np.ndarray
    objects: tuple[ClipObject, ...]

    @property
    def frames(self) -> list[Image.Image]:
        return [Image.fromarray(frame) for frame in self.pixels]


def generate_clip(rng: np.random.Generator, frames: int | None = None, max_objects: int = _MAX_OBJECTS) -> Clip:
    """Draw one clip.

    Args:
        rng: Draws everything.
        frames: How many frames the clip has; 4 to 8, drawn as well, by default.
        max_objects: The clip has 1 to this many objects.
    """
    count = int(rng.integers(FRAMES[0], FRAMES[1] + 1)) if frames is None else frames
    if count < 2:
        raise ValueError(f"a clip has at least 2 frames, got {count}")
    background, smooth = draw_background(rng), rng.random() < 0.7
    placed, many = None, int(rng.integers(1, max_objects + 1))
    while placed is None:
        placed = _place(rng, many, count, smooth)
    canvas = np.broadcast_to(background, (count, CANVAS, CANVAS, 3)).astype(np.float32)
    objects = []
    for shape, event, coverage in placed:
        at = _moment(rng, event, count)
        coverage[: at if event == "appears" else 0] = 0
        names, tones = _colors(rng, background, event, at, count)
        canvas += coverage[..., None] * (tones[:, None, None] - canvas)
        objects.append(ClipObject(shape, names, coverage >= 0.5, event, at))
    draw_noise(rng, canvas)
    pixels = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    return Clip(pixels, tuple(sorted(objects, key=lambda one: _middle(one.masks[-1]))))


def _middle(mask: np.ndarray) -> float:
    return float(np.flatnonzero(mask.any(0)).mean())


def _moment(rng: np.random.Generator, event: str, frames: int) -> int:
    """Draw the frame of an event; that of an appearance is clearly in one half."""
    if event not in ("turns", "appears"):
        return 0
    while True:
        at = int(rng.integers(1, frames))
        if event == "turns" or 2 * at != frames - 1:
            return at


def _colors(
    rng: np.random.Generator, background: np.ndarray, event: str, at: int, frames: int
) -> tuple[tuple[str, ...], np.ndarray]:
    """Draw the name and the tone of an object's colour in each frame, float32 [frames, 3]."""
    first = after = draw_color(rng, background)
    while event == "turns" and after[0] == first[0]:
        after = draw_color(rng, background)
    each = [first if frame < at else after for frame in range(frames)]
    return tuple(name for name, _ in each), np.stack([tone for _, tone in each])


def _place(rng: np.random.Generator, count: int, frames: int, smooth: bool) -> list[tuple[str, str, np.ndarray]] | None:
    """Place objects that never touch: (shape, event, share of each pixel [frames, 64, 64]); None without room.

    Half of the clips have two objects of one shape, so that a question about a shape needs what happens to it.
    """
    shapes = [str(rng.choice(SHAPES)) for _ in range(count)]
    if count > 1 and rng.random() < 0.5:
        shapes[1] = shapes[0]
    taken = np.zeros((CANVAS, CANVAS), bool)
    placed = []
    for shape in shapes:
        event = str(rng.choice(EVENTS, p=_SHARES))
        coverage = shape_coverage(shape, float(rng.integers(_SIZES[0], _SIZES[1] + 1)), rng, smooth)
        path = _path(rng, coverage, event, frames, taken)
        if path is None:
            return None
        taken |= _grown(path.max(0) > 0)
        placed.append((shape, event, path))
    return placed


def _path(
    rng: np.random.Generator, coverage: np.ndarray, event: str, frames: int, taken: np.ndarray
) -> np.ndarray | None:
    """Return an object's share of each pixel in each frame where it touches nothing; None if no place was found."""
    height, width = coverage.shape
    room = np.array([CANVAS - width, CANVAS - height])
    for _ in range(_TRIES):
        start = rng.integers(0, room + 1)
        end = rng.integers(0, room + 1) if event == "moves" else start
        if event == "moves" and np.hypot(*(end - start)) < _PATH:
            continue
        path = np.zeros((frames, CANVAS, CANVAS), np.float32)
        corners = np.rint(start + (end - start) * np.linspace(0, 1, frames)[:, None]).astype(int)
        for frame, (left, top) in enumerate(corners):
            path[frame, top : top + height, left : left + width] = coverage
        if not (taken & (path.max(0) > 0)).any():
            return path
    return None


def _grown(mask: np.ndarray) -> np.ndarray:
    """Return a mask with one more pixel all around."""
    padded = np.pad(mask, 1)
    return mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
