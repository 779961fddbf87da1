"""Generated scenes of two to four coloured shapes on a plain or noisy background, with the mask of every object.

The generator is the ground truth of the embedded model. The model trains on these scenes, and the fidelity benchmark
compares heatmaps with `SceneObject.mask`. Everything is drawn from one numpy Generator, so a seed always gives the same
scene.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

CANVAS = 96  # pixels a side
SIZES = (18, 30)  # smallest and largest object, pixels across
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
# Each colour has several RGB anchors: renderers disagree about what "green" is, but the model must not.
COLORS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "red": ((220, 30, 30), (255, 0, 0), (200, 20, 40)),
    "green": ((30, 170, 40), (0, 128, 0), (20, 200, 60), (0, 230, 0)),
    "blue": ((40, 60, 230), (0, 0, 255), (30, 80, 200)),
    "yellow": ((240, 225, 40), (255, 255, 0), (235, 210, 20)),
    "purple": ((140, 40, 190), (128, 0, 128), (155, 50, 215)),
    "orange": ((245, 130, 20), (255, 165, 0), (255, 120, 0)),
    "white": ((245, 245, 245), (255, 255, 255)),
    "black": ((14, 14, 14), (0, 0, 0)),
}
_MIN_CONTRAST = 70.0  # Euclidean RGB distance of an object from the background
_MIN_ORDER_GAP = 3.0  # pixels between centres in x, so that "left to right" names one order


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene.

    Attributes:
        shape: The shape, one of `SHAPES`.
        color: The colour, one of `COLORS`.
        box: (left, top, right, bottom) in pixels; right and bottom are exclusive.
        mask: The pixels of the object, bool [96, 96].
    """

    shape: str
    color: str
    box: tuple[int, int, int, int]
    mask: np.ndarray

    @property
    def center(self) -> tuple[float, float]:
        """The centre (x, y) of the box, in pixels."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Scene:
    """A scene with its ground truth.

    Attributes:
        pixels: The image, uint8 [96, 96, 3].
        objects: The objects from left to right.
        background: The RGB tone of the background without the noise.
    """

    pixels: np.ndarray
    objects: tuple[SceneObject, ...]
    background: tuple[int, int, int]

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels)


def generate_scene(rng: np.random.Generator, min_objects: int = 2, max_objects: int = 4) -> Scene:
    """Draw one scene with `min_objects` to `max_objects` objects; each count is equally likely."""
    if not 1 <= min_objects <= max_objects <= 4:
        raise ValueError(f"1 <= min_objects <= max_objects <= 4 is needed, got {min_objects} and {max_objects}")
    count = int(rng.integers(min_objects, max_objects + 1))
    background = draw_background(rng)
    smooth = rng.random() < 0.7  # some renderers do not antialias
    canvas = np.broadcast_to(background, (CANVAS, CANVAS, 3)).astype(np.float32)
    while True:
        placed = _place(rng, count, smooth)
        if placed is not None:
            break
    objects = []
    for shape, coverage, left, top in placed:
        color, rgb = draw_color(rng, background)
        height, width = coverage.shape
        window = canvas[top : top + height, left : left + width]
        window += coverage[..., None] * (rgb - window)
        mask = np.zeros((CANVAS, CANVAS), bool)
        mask[top : top + height, left : left + width] = coverage >= 0.5
        objects.append(SceneObject(shape, color, _bounding_box(mask), mask))
    draw_noise(rng, canvas)
    pixels = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    tone = tuple(int(c) for c in np.rint(background))
    return Scene(pixels, tuple(sorted(objects, key=lambda o: o.center[0])), tone)  # type: ignore[arg-type]


def draw_noise(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """Add grey or coloured noise to more than half of the canvases [..., H, W, 3]."""
    if rng.random() < 0.6:
        channels = 1 if rng.random() < 0.5 else 3
        canvas += rng.standard_normal((*canvas.shape[:-1], channels), np.float32) * np.float32(rng.uniform(2, 12))


def draw_background(rng: np.random.Generator) -> np.ndarray:
    """Draw the tone of a background, float [3]."""
    if rng.random() < 0.5:
        return np.clip(rng.uniform(60, 205) + rng.uniform(-10, 10, 3), 0, 255)
    light = rng.uniform(170, 245)  # a pastel is one light tone with slightly different channels
    return np.clip(light - rng.uniform(0, 60, 3), 0, 255)


def draw_color(rng: np.random.Generator, background: np.ndarray) -> tuple[str, np.ndarray]:
    """Draw a colour that stands out from a background: its name, and its tone, float32 [3]."""
    while True:
        color = str(rng.choice(list(COLORS)))
        anchors = COLORS[color]
        rgb = np.array(anchors[rng.integers(len(anchors))]) + rng.uniform(-12, 12, 3)
        if float(np.linalg.norm(np.clip(rgb, 0, 255) - background)) >= _MIN_CONTRAST:
            return color, np.clip(rgb, 0, 255).astype(np.float32)


def _place(rng: np.random.Generator, count: int, smooth: bool) -> list[tuple[str, np.ndarray, int, int]] | None:
    """Place `count` shapes where there is room; return None if one of them finds no room."""
    taken = np.zeros((CANVAS, CANVAS), bool)
    placed: list[tuple[str, np.ndarray, int, int]] = []
    centers: list[float] = []
    for _ in range(count):
        shape = str(rng.choice(SHAPES))
        coverage = shape_coverage(shape, float(rng.integers(SIZES[0], SIZES[1] + 1)), rng, smooth)
        height, width = coverage.shape
        for _ in range(40):
            left = int(rng.integers(0, CANVAS - width + 1))
            top = int(rng.integers(0, CANVAS - height + 1))
            # one free pixel all around, so that objects touch neither each other nor each other's edge
            around = taken[max(top - 1, 0) : top + height + 1, max(left - 1, 0) : left + width + 1]
            center = left + width / 2
            if around.any() and _touches(taken, coverage, left, top):
                continue
            if any(abs(center - other) < _MIN_ORDER_GAP for other in centers):
                continue
            taken[top : top + height, left : left + width] |= coverage > 0
            placed.append((shape, coverage, left, top))
            centers.append(center)
            break
        else:
            return None
    return placed


def _touches(taken: np.ndarray, coverage: np.ndarray, left: int, top: int) -> bool:
    grown = np.pad(coverage > 0, 1)
    grown = grown | np.roll(grown, 1, 0) | np.roll(grown, -1, 0) | np.roll(grown, 1, 1) | np.roll(grown, -1, 1)
    height, width = grown.shape
    padded = np.pad(taken, 1)
    return bool((padded[top : top + height, left : left + width] & grown).any())


def _bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(cols[0]), int(rows[0]), int(cols[-1]) + 1, int(rows[-1]) + 1


def shape_coverage(shape: str, size: float, rng: np.random.Generator, smooth: bool = True) -> np.ndarray:
    """Draw a shape and return the share of each pixel that it covers, float32 [h, w], cropped to its bounding box.

    Args:
        shape: The shape, one of `SHAPES`.
        size: The width in pixels before the rotation.
        rng: Draws the proportions and the rotation.
        smooth: Whether the edges are antialiased.
    """
    samples = 4 if smooth else 1
    extent = int(size) + 10  # room for a turned square's corners
    axis = (np.arange(extent * samples, dtype=np.float32) + 0.5) / samples - extent / 2
    turn = 0.0
    if rng.random() < 0.3:
        turn = float(rng.uniform(-0.2, 0.2))
    if shape in ("triangle", "star") and rng.random() < 0.12:
        turn += np.pi
    if shape == "cross" and rng.random() < 0.15:
        turn += np.pi / 4
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    x, y = axis[None, :], axis[:, None]
    u, v = cos * x + sin * y, cos * y - sin * x
    inside = _INSIDE[shape](u, v, size / 2, rng)
    coverage = inside.reshape(extent, samples, extent, samples).mean((1, 3), dtype=np.float32)
    left, top, right, bottom = _bounding_box(coverage > 0)
    return coverage[top:bottom, left:right]


def _circle(u, v, r, rng):
    return u * u + v * v <= r * r


def _square(u, v, r, rng):
    return np.maximum(np.abs(u), np.abs(v)) <= r * rng.uniform(0.86, 1.0)


def _triangle(u, v, r, rng):
    height = 2 * r * rng.uniform(0.84, 1.0)
    top = -height / 2
    return (v <= height / 2) & (np.abs(u) * height <= (v - top) * r)


def _star(u, v, r, rng):
    inner = r * rng.uniform(0.38, 0.52)
    # fold the plane onto one half-point of the star: outer tip at angle 0, inner corner at 36 degrees
    fifth = 2 * np.pi / 5
    angle = np.abs((np.arctan2(u, -v) + fifth / 2) % fifth - fifth / 2)
    radius = np.hypot(u, v)
    px, py = radius * np.cos(angle), radius * np.sin(angle)
    bx, by = inner * np.cos(fifth / 2), inner * np.sin(fifth / 2)
    return (px - r) * by - py * (bx - r) <= 0


def _cross(u, v, r, rng):
    arm = r * rng.uniform(0.25, 0.42)
    au, av = np.abs(u), np.abs(v)
    return ((au <= arm) & (av <= r)) | ((av <= arm) & (au <= r))


def _ring(u, v, r, rng):
    q = u * u + v * v
    return (q <= r * r) & (q >= (r * rng.uniform(0.5, 0.72)) ** 2)


_INSIDE = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
}
