"""Benchmarks of yes-or-no questions in their published formats: MME (arXiv 2306.13394) and POPE (arXiv 2305.10355).

An entry that does not fit the format (an image that is missing, a line without an answer, an image without its pair of
questions) becomes a sample with a problem. Such samples are counted and shown; none is skipped silently.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import InputError
from ..core.images import ENDINGS
from ..shapes.questions import Question, ask
from ..shapes.scenes import Scene
from .samples import Sample, Samples, YesNo, scenes

_PICTURES, _QUESTIONS = "images", "questions_answers_YN"
_ANSWER = re.compile(r"\W*(yes|no)\W*", re.IGNORECASE)


def mme(folder: Path, count: int | None = None) -> Samples:
    """Read the MME benchmark.

    Each task has a folder. It holds images, and for each image a text file of the same name with two lines, question
    TAB answer. The images and text files lie side by side, or in the folders `images` and `questions_answers_YN`.

    Args:
        folder: The folder of the benchmark.
        count: The number of images to take from each task, in order; None takes all.

    Raises:
        InputError: The folder does not exist, or there is no task in it.
    """
    tasks = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    found = [sample for task in tasks for sample in _task(task)[:count]]
    if not found:
        raise InputError(f"{folder}: holds no task of MME (folders with images and a text file beside each)")
    return Samples(found, {"mme": str(folder)})


def _task(task: Path) -> list[Sample]:
    pictures, texts = _by_stem(task, _PICTURES, ENDINGS), _by_stem(task, _QUESTIONS, (".txt",))
    stems = sorted({*pictures, *texts})
    return [_mme_sample(task.name, stem, pictures.get(stem, []), texts.get(stem, [])) for stem in stems]


def _by_stem(task: Path, inner: str, endings: tuple[str, ...]) -> dict[str, list[Path]]:
    """Return the files of a task and of the folder `inner` in it, by their names without the ending."""
    places = [place for place in (task, task / inner) if place.is_dir()]
    found = (path for place in places for path in sorted(place.iterdir()) if path.suffix.lower() in endings)
    by_stem: dict[str, list[Path]] = {}
    for path in found:
        by_stem.setdefault(path.stem, []).append(path)
    return by_stem


def _mme_sample(task: str, stem: str, pictures: list[Path], texts: list[Path]) -> Sample:
    name = f"{task}/{stem}"
    for what, files in (("image", pictures), ("text file of questions", texts)):
        if len(files) != 1:
            state = f"is there {len(files)} times" if files else "is missing"
            return Sample(name, [*pictures, *texts][0], group=task, problem=f"{name}: its {what} {state}")
    (picture,), (text,) = pictures, texts
    questions: list[YesNo] = []
    for line in text.read_text(encoding="utf-8-sig", errors="replace").splitlines():
        if not line.strip():
            continue
        question, tab, answer = line.rpartition("\t")
        said = _ANSWER.fullmatch(answer)
        if not tab or not question.strip() or said is None:
            problem = f"{name}: {line.strip()[:80]!r} is no question, a tab, and yes or no"
            return Sample(name, picture, group=task, problem=problem)
        questions.append(YesNo(question.strip(), said[1].lower() == "yes"))
    problem = "" if len(questions) == 2 else f"{name}: has {len(questions)} questions, MME asks two of an image"
    return Sample(name, picture, questions=tuple(questions), group=task, problem=problem)


def pope(folder: Path, pictures: Path | None = None, count: int | None = None) -> Samples:
    """Read the POPE benchmark.

    The questions are in files (..._random.json, ..._popular.json, ..._adversarial.json). Each file has one line of JSON
    for each question, or is one JSON list.

    Args:
        folder: The folder with the files of questions.
        pictures: The folder of the images, which may lie anywhere in it. By default it is `folder`.
        count: The number of images to take from each file, in order; None takes all.

    Raises:
        InputError: A folder does not exist, there is no file of questions, or a file has another format.
    """
    files = sorted(folder.rglob("*.json")) if folder.is_dir() else []
    if not files:
        raise InputError(f"{folder}: holds no file of questions of POPE (.json)")
    where = pictures or folder
    if not where.is_dir():
        raise InputError(f"{where}: is no folder of images")
    known = {path.name: path for path in sorted(where.rglob("*")) if path.suffix.lower() in ENDINGS}
    found: list[Sample] = []
    for file in files:
        place = file.relative_to(folder).with_suffix("").as_posix()
        asked: dict[str, list[Any]] = {}
        for entry in _entries(file):
            asked.setdefault(str(entry.get("image")), []).append(entry)
        for image, entries in list(asked.items())[:count]:
            found.append(
                _pope_sample(f"{place}/{image}", file.stem, known.get(Path(image).name), where / image, entries)
            )
    return Samples(found, {"pope": str(folder), "pictures": str(where)})


def _entries(file: Path) -> list[dict[str, Any]]:
    text = file.read_text(encoding="utf-8-sig")
    try:
        found = (
            json.loads(text) if text.lstrip().startswith("[") else map(json.loads, filter(str.strip, text.splitlines()))
        )
        entries = [dict(entry) for entry in found]
    except (ValueError, TypeError):
        raise InputError(f"{file}: not POPE's questions (a line of JSON each, with image, text and label)") from None
    return entries


def _pope_sample(name: str, group: str, picture: Path | None, wanted: Path, entries: list[Any]) -> Sample:
    if picture is None:
        return Sample(name, wanted, group=group, problem=f"{name}: its image is missing")
    questions = []
    for entry in entries:
        text, said = entry.get("text"), _ANSWER.fullmatch(str(entry.get("label")))
        if not isinstance(text, str) or not text.strip() or said is None:
            problem = f"{name}: a question needs a text and a label, yes or no, got {entry.get('label')!r}"
            return Sample(name, picture, group=group, problem=problem)
        questions.append(YesNo(text.strip(), said[1].lower() == "yes"))
    return Sample(name, picture, questions=tuple(questions), group=group)


def scene_pairs(count: int, seed: int = 0) -> Samples:
    """Return generated scenes, each with one question to answer with yes and one to answer with no."""
    plain = scenes(count, seed)
    found = []
    for number, sample in enumerate(plain.list):
        assert sample.scene is not None
        rng = np.random.default_rng([seed, number, 1])
        pair = tuple(_asked(sample.scene, rng, answer) for answer in ("yes", "no"))
        found.append(Sample(sample.name, sample.scene, sample.things, pair, "existence"))
    return Samples(found, {"scene pairs": seed})


def _asked(scene: Scene, rng: np.random.Generator, answer: str) -> YesNo:
    while True:
        question: Question | None = ask(scene, rng, "exists")
        if question is not None and question.answer == answer:
            return YesNo(question.text, answer == "yes")
