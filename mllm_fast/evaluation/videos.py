"""Videos with questions whose moment is known: generated clips, or a folder with events.json."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import InputError, first_line
from ..shapes.clip_questions import TASKS, ClipQuestion, ask
from ..shapes.clips import FPS, Clip, generate_clip
from .samples import Sample, Samples

EVENTS = "events.json"
_ASKED = TASKS[:-1]  # a description has no moment of its own


@dataclass(frozen=True, eq=False)
class Event:
    """A question about a video, and when what it asks about is shown.

    Attributes:
        question: The question.
        seconds: The first and the last second that show it.
        answer: The right answer, or None if it is not known.
        task: The kind of question; "" for one kind.
        masks: The pixels of what is asked about, by the frame of the source; None if they are not known.
    """

    question: str
    seconds: tuple[float, float]
    answer: str | None = None
    task: str = ""
    masks: np.ndarray | None = None


def clips(count: int, seed: int = 0) -> Samples:
    """Return `count` generated clips with a question each; the kinds of questions take turns.

    Each clip depends only on `seed` and its number. An event changes something: colours that stay are not asked for.
    """
    if count < 1:
        raise InputError(f"the number of clips is at least 1, got {count}")
    return Samples([_clip(number, seed) for number in range(count)], {"clips": seed})


def _clip(number: int, seed: int) -> Sample:
    rng, task = np.random.default_rng([seed, number]), _ASKED[number % len(_ASKED)]
    while True:
        clip = generate_clip(rng)
        question = ask(clip, rng, task)
        if question is not None and (task == "moves" or question.frames != (0, len(clip.pixels) - 1)):
            return Sample(f"clip {number}", clip, events=(_event(clip, question),))


def _event(clip: Clip, question: ClipQuestion) -> Event:
    assert question.target is not None
    first, last = question.frames
    masks = clip.objects[question.target].masks
    return Event(question.text, (first / FPS, last / FPS), question.answer, question.task, masks)


def videos(folder: Path, count: int | None = None) -> Samples:
    """Return the videos of a folder, with the events of its events.json.

    The file is {"clip.mp4": [{"question": "...", "start": 3.0, "end": 5.5, "answer": "..."}]}; answers may be left out.

    Raises:
        InputError: The file is missing or not of this form, or names a video that is not there.
    """
    path = folder / EVENTS
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read ({first_line(error)}); it says what is asked about each video"
        ) from None
    if not isinstance(given, dict) or not given:
        raise InputError(f'{path}: is {{"clip.mp4": [{{"question": "...", "start": 3.0, "end": 5.5}}]}}')
    found = []
    for name, events in list(given.items())[:count]:
        if not (folder / name).is_file():
            raise InputError(f"{path}: names {name}, which is not in the folder")
        found.append(Sample(name, folder / name, events=tuple(_events(events, f"{path}: {name}"))))
    return Samples(found, {"folder": str(folder)})


def _events(given: Any, where: str) -> Sequence[Event]:
    if not isinstance(given, list) or not given:
        raise InputError(f"{where}: has a list of events, at least one")
    found = []
    for one in given:
        texts = isinstance(one, dict) and isinstance(one.get("question"), str) and one["question"].strip()
        answer = one.get("answer") if isinstance(one, dict) else None
        ends = [one.get(name) if isinstance(one, dict) else None for name in ("start", "end")]
        numbers = all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in ends)
        if not texts or not numbers or not (answer is None or (isinstance(answer, str) and answer.strip())):
            raise InputError(f'{where}: an event has a "question", "start" and "end" in seconds, and maybe an "answer"')
        start, end = (float(one) for one in ends)  # type: ignore[arg-type]
        if not 0 <= start <= end < math.inf:
            raise InputError(f"{where}: an event ends after it starts, got {start:g} to {end:g}")
        found.append(Event(one["question"], (start, end), answer))
    return found
