"""The images and videos of a prompt: the parts of a turn that stand for them, and the pictures that show them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image

from ..core.layout import TokenLayout
from ..core.video import LoadedVideo


class _Video:
    """Stands for a video in a turn, as None does for an image; false, so that it is no text."""

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "VIDEO"


VIDEO = _Video()
Part = str | _Video | None  # a text, or what stands for the next video or image
Turn = tuple[str, list[Part]]  # a role and its parts


def as_parts(media: int | Sequence[Part]) -> list[Part]:
    """Return what stands for images and videos; a number stands for that many images."""
    return [None] * media if isinstance(media, int) else list(media)


def words_of(parts: Iterable[Part]) -> list[str]:
    """Return the texts of a turn."""
    return [part for part in parts if isinstance(part, str)]


def parts_of(media: Sequence[Any]) -> list[Part]:
    """Return what stands for images and videos in a turn; a video whose frames are read as images is many."""
    found: list[Part] = []
    for one in media:
        if not isinstance(one, LoadedVideo):
            found.append(None)
        elif one.as_images:
            found += [None] * len(one.frames)
        else:
            found.append(VIDEO)
    return found


def with_frames(turns: Sequence[Turn], media: Sequence[Any]) -> list[Turn]:
    """Return turns in which a video stands as many images if its frames are read so.

    Args:
        turns: The turns, with `VIDEO` for each video.
        media: The images and videos, in the order in which the turns refer to them.
    """
    left = iter(media)
    found: list[Turn] = []
    for role, parts in turns:
        found.append((role, []))
        for part in parts:
            found[-1][1].extend([part] if isinstance(part, str) else parts_of([next(left)]))
    return found


def parts_of_layout(layout: TokenLayout) -> list[Part]:
    """Return what stood for the images and videos of a prompt in its turn."""
    found: list[Part] = []
    seen = set()
    for image in layout.images:
        moment = image.moment
        if moment is None or moment.as_image:
            found.append(None)
        elif moment.video not in seen:
            seen.add(moment.video)
            found.append(VIDEO)
    return found


def stills(media: Sequence[Any]) -> list[Image.Image]:
    """Return the images that the image processor reads, frames that are read as images among them."""
    found: list[Image.Image] = []
    for one in media:
        if not isinstance(one, LoadedVideo):
            found.append(one)
        elif one.as_images:
            found += one.frames
    return found


def clips(media: Sequence[Any]) -> list[LoadedVideo]:
    """Return the videos that the video processor reads."""
    return [one for one in media if isinstance(one, LoadedVideo) and not one.as_images]


def shown(media: Sequence[Any], layout: TokenLayout) -> list[Image.Image]:
    """Return the picture of each image of a layout: an image, or the first frame of a moment."""
    videos = [one for one in media if isinstance(one, LoadedVideo)]
    left = iter([one for one in media if not isinstance(one, LoadedVideo)])
    found = []
    for image in layout.images:
        if image.moment is None:
            found.append(next(left))
        else:
            video = videos[image.moment.video]
            found.append(video.frames[video.indices.index(image.moment.frames[0])])
    return found
