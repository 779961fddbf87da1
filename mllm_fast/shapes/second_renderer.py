"""A second renderer for the same kind of scenes, with Pillow's polygons, pure web colours and its own placement.

The model never trains on these scenes. They show whether it learned shapes or the pixels of one program.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter

from .scenes import CANVAS, COLORS, SHAPES, SIZES, Scene, SceneObject

_GREYS_AND_PASTELS = ("#9a9a9a", "#777777", "#bbbbbb", "#cfd8dc", "#d7ccc8", "#c5cae9", "#f8d7da", "#d1ecf1", "#e2d9f3")


def draw_scene(rng: np.random.Generator, min_objects: int = 2, max_objects: int = 4) -> Scene:
    """Draw one scene like `scenes.generate_scene`, but with boxes that do not overlap."""
    count = int(rng.integers(min_objects, max_objects + 1))
    boxes = _boxes(rng, count)
    tone = ImageColor.getrgb(str(rng.choice(_GREYS_AND_PASTELS)))
    zoom = int(rng.choice((1, 4)))  # hard edges, or smooth ones by drawing at 4 times the size
    picture = Image.new("RGB", (CANVAS * zoom, CANVAS * zoom), tone)
    objects = []
    for left, top, size in boxes:
        shape = str(rng.choice(SHAPES))
        color = str(rng.choice([c for c in COLORS if _contrast(ImageColor.getrgb(c), tone) > 80]))
        stencil = Image.new("L", picture.size, 0)
        _draw(ImageDraw.Draw(stencil), shape, left * zoom, top * zoom, size * zoom)
        picture.paste(ImageColor.getrgb(color), mask=stencil)
        small = np.asarray(stencil.resize((CANVAS, CANVAS), Image.Resampling.BOX))
        objects.append(SceneObject(shape, color, (left, top, left + size, top + size), small >= 128))
    picture = picture.resize((CANVAS, CANVAS), Image.Resampling.BOX)
    if rng.random() < 0.2:
        picture = picture.filter(ImageFilter.GaussianBlur(0.5))
    pixels = np.asarray(picture).astype(np.float64)
    if rng.random() < 0.5:
        pixels = pixels + rng.uniform(-15, 15, (CANVAS, CANVAS, 1))
    pixels = np.clip(pixels, 0, 255).astype(np.uint8)
    return Scene(pixels, tuple(sorted(objects, key=lambda o: o.center[0])), tone)  # type: ignore[arg-type]


def _boxes(rng: np.random.Generator, count: int) -> list[tuple[int, int, int]]:
    boxes: list[tuple[int, int, int]] = []
    while len(boxes) < count:
        size = int(rng.integers(SIZES[0], SIZES[1] + 1))
        left, top = (int(v) for v in rng.integers(0, CANVAS - size + 1, 2))
        apart = all(left + size < x or x + s < left or top + size < y or y + s < top for x, y, s in boxes) and all(
            abs(left + size / 2 - x - s / 2) >= 3 for x, _, s in boxes
        )
        if apart:
            boxes.append((left, top, size))
        elif rng.random() < 0.01:
            boxes.clear()  # the canvas may be full, so begin again
    return boxes


def _contrast(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    return math.dist(a[:3], b[:3])


def _draw(draw: ImageDraw.ImageDraw, shape: str, left: int, top: int, size: int) -> None:
    right, bottom = left + size - 1, top + size - 1
    middle_x, middle_y, radius = (left + right) / 2, (top + bottom) / 2, (size - 1) / 2
    if shape == "circle":
        draw.ellipse((left, top, right, bottom), fill=255)
    elif shape == "square":
        draw.rectangle((left, top, right, bottom), fill=255)
    elif shape == "triangle":
        draw.polygon([(middle_x, top), (right, bottom), (left, bottom)], fill=255)
    elif shape == "star":
        angles = [math.radians(-90 + 36 * k) for k in range(10)]
        radii = [radius if k % 2 == 0 else radius * 0.42 for k in range(10)]
        points = [(middle_x + r * math.cos(a), middle_y + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]
        draw.polygon(points, fill=255)
    elif shape == "cross":
        third = size / 3
        draw.rectangle((left + third, top, right - third, bottom), fill=255)
        draw.rectangle((left, top + third, right, bottom - third), fill=255)
    else:
        draw.ellipse((left, top, right, bottom), outline=255, width=max(2, round(size * 0.18)))
