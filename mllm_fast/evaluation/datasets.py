"""Benchmarks of yes-or-no questions in their published formats: MME (arXiv 2306.13394) and POPE (arXiv 2305.10355).

An entry that does not fit the format (an image that is missing, a line without an answer, an image without its pair of
questions) becomes a sample with a problem. Such samples are counted and shown; none is skipped silently.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import InputError
from ..core.images import ENDINGS
from ..shapes.questions import Question, ask
from ..shapes.scenes import Scene
from .samples import Sample, Samples, YesNo, scenes

_PICTURES, _QUESTIONS = "images", "questions_answers_YN"
_POPE_ENDINGS, _POPE_KEYS = (".json", ".jsonl"), ("image", "text", "label")
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

    The questions are in files (..._random.json, ..._popular.json, ..._adversarial.json, or .jsonl). Each file has one
    line of JSON for each question, or is one JSON list. Files whose entries have no image, text and label, such as
    models' answers, questions without labels and lists of objects, lie beside them in the authors' and in other
    repositories: they are left out, and so are copies. The samples' notes say which.

    Args:
        folder: The folder with the files of questions, or one such file.
        pictures: The folder of the images, which may lie anywhere in it. By default it is `folder`.
        count: The number of images to take from each file, in order; None takes all.

    Raises:
        InputError: A folder does not exist, there is no file of questions, or a file has another format.
    """
    whole = folder.parent if folder.is_file() else folder
    files = [folder] if folder.is_file() else sorted(one for one in folder.rglob("*") if one.suffix in _POPE_ENDINGS)
    where = pictures or whole
    if not where.is_dir():
        raise InputError(f"{where}: is no folder of images")
    asking, notes = _asking(files, whole)
    if not asking:
        told = "".join(f"; {note}" for note in notes)
        raise InputError(f"{folder}: holds no file of POPE's questions (.json, .jsonl: image, text and label){told}")
    known = {path.name: path for path in sorted(where.rglob("*")) if path.suffix.lower() in ENDINGS}
    found: list[Sample] = []
    for file, entries_of_file in asking.items():
        place = file.relative_to(whole).with_suffix("").as_posix()
        asked: dict[str, list[Any]] = {}
        for entry in entries_of_file:
            asked.setdefault(str(entry.get("image")), []).append(entry)
        for image, entries in list(asked.items())[:count]:
            found.append(
                _pope_sample(f"{place}/{image}", file.stem, known.get(Path(image).name), where / image, entries)
            )
    return Samples(found, {"pope": str(folder), "pictures": str(where)}, notes)


def _asking(files: Sequence[Path], folder: Path) -> tuple[dict[Path, list[dict[str, Any]]], tuple[str, ...]]:
    """Return the entries of each file of questions, and a note on each other file."""
    found: dict[Path, list[dict[str, Any]]] = {}
    notes = []
    for file in files:
        name, entries = file.relative_to(folder).as_posix(), _entries(file)
        twin = next((one for one, known in found.items() if known == entries), None)
        if entries is None:
            notes.append(f"{name} is left out: it is no list of questions")
        elif not any(all(one.get(key) is not None for key in _POPE_KEYS) for one in entries):
            missing = [key for key in _POPE_KEYS if all(one.get(key) is None for one in entries)]
            notes.append(f"{name} is left out: its entries have no {' and no '.join(missing or ['questions'])}")
        elif twin is not None:
            notes.append(f"{name} is left out: it is a copy of {twin.relative_to(folder).as_posix()}")
        else:
            found[file] = entries
    return found, tuple(notes)


def _entries(file: Path) -> list[dict[str, Any]] | None:
    """Return the objects of a file of JSON, one list or a line each; None if it holds something else."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        found = (
            json.loads(text) if text.lstrip().startswith("[") else map(json.loads, filter(str.strip, text.splitlines()))
        )
        entries = list(found)
    except (ValueError, TypeError):
        return None
    return entries if all(isinstance(one, dict) for one in entries) else None


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
