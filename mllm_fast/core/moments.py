"""Moments of videos, and the segments that name them: "frame:12", "time:3.0-5.5", "video:0/frame:12-20"."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .errors import InputError

_CLOCK = 1e-3  # seconds within which two times are one
_LISTED = 16  # moments that an error names
_NUMBER = r"\d{1,12}(?:\.\d{0,6})?"
_MOMENTS = re.compile(
    rf"(?:video:(?P<video>\d{{1,6}})/)?(?P<kind>frame|time):(?P<first>{_NUMBER})(?:-(?P<last>{_NUMBER}))?"
)


class Moment(NamedTuple):
    """The part of a video that one group of tokens shows: a frame, or several that the model merges.

    Attributes:
        video: The index of the video in the prompt.
        frames: The places of the frames in the source, ascending.
        seconds: The times at which the first and the last of them are shown.
        as_image: Whether the model read the frame as an image of its own.
    """

    video: int
    frames: tuple[int, ...]
    seconds: tuple[float, float]
    as_image: bool = False


def named_moments(moments: Sequence[Moment | None], segment: str, known: Iterable[str]) -> tuple[int, ...]:
    """Return which moments a segment names.

    Args:
        moments: The moment of each image of a prompt, None for a still one.
        segment: The segment.
        known: The segments that have names of their own, for the error.

    Raises:
        InputError: The text is no such segment, or no frame that the model read lies there.
    """
    match = _MOMENTS.fullmatch(segment.replace(" ", ""))
    if match is None or (match["kind"] == "frame" and "." in match["first"] + (match["last"] or "")):
        raise InputError(
            f"segment is one of {', '.join(known)}, frame:12, frame:12-20, time:3.0-5.5 (in seconds) or"
            f" video:0/frame:12, got {segment!r}"
        )
    first = float(match["first"])
    last = float(match["last"] or first)
    asked = [(i, one) for i, one in enumerate(moments) if one is not None and match["video"] in (None, str(one.video))]
    found = [i for i, one in asked if _shows(one, match["kind"], first, last)]
    if not found:
        read = [_spelled(one, match["kind"]) for one in moments if one is not None]
        more = f" and {len(read) - _LISTED} more" if len(read) > _LISTED else ""
        raise InputError(
            f"no frame that the model read lies in {segment!r}; those that it read are at"
            f" {', '.join(read[:_LISTED])}{more}"
        )
    return tuple(found)


def _shows(moment: Moment, kind: str, first: float, last: float) -> bool:
    """Return whether a moment has a frame, or a time, from `first` to `last`."""
    if kind == "frame":
        return any(first <= frame <= last for frame in moment.frames)
    return moment.seconds[0] <= last + _CLOCK and moment.seconds[1] >= first - _CLOCK


def time_label(moment: Moment) -> str:
    """Return when a moment is shown, as in "1.50 s" or "1.50\u20131.96 s"."""
    ends = [f"{end:.2f}" for end in moment.seconds]
    return "\u2013".join(dict.fromkeys(ends)) + " s"


def _spelled(moment: Moment, kind: str) -> str:
    ends = moment.seconds if kind == "time" else (moment.frames[0], moment.frames[-1])
    texts = [f"{end:.2f}" if kind == "time" else str(end) for end in ends]
    return "-".join(dict.fromkeys(texts))


def moment_of(plain: dict[str, Any] | None) -> Moment | None:
    """Return a moment from what `Moment._asdict` gave, after JSON."""
    if plain is None:
        return None
    frames, (first, last) = tuple(int(one) for one in plain["frames"]), plain["seconds"]
    return Moment(int(plain["video"]), frames, (float(first), float(last)), bool(plain["as_image"]))
