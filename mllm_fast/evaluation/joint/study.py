"""Make and read the user study of arXiv 2405.14612 (section 4.3 and supplement, section 3).

A question shows an image and two maps of gradient alignment, of two things in the image, and asks which map is whose.
Readers who can tell understand what the maps show (simulatability).
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from ...core.errors import InputError
from ...drawing.heatmap import overlay
from ..people import filled_page, read_table
from ..report import COLORS, Chart, Report, Table
from ..samples import Sample, Samples
from .base import interval, number_of, percent

if TYPE_CHECKING:
    from ...explain.box_weights import BoxWeights
    from ...joint.model import JointModel

COLUMNS = ("participant", "question", "answer")
PROMPT, ANSWER, QUERY = "What is in the image?", "The image shows a {}", "a photo of a {}"
_PAGE = Path(__file__).with_name("study.html")
_SIDE = 420  # pixels of the longer side of an image on the page


class StudyQuestion(NamedTuple):
    """A question of the study.

    Attributes:
        image: The name of the sample.
        things: The names of the two things.
        first: The thing whose map is shown first, 0 or 1.
        pictures: The image and the two maps over it, as they are shown.
    """

    image: str
    things: tuple[str, str]
    first: int
    pictures: tuple[Image.Image, Image.Image, Image.Image]


def study_questions(
    joint: JointModel,
    samples: Samples,
    count: int = 10,
    seed: int = 0,
    prompt: str = PROMPT,
    answer: str = ANSWER,
    query: str = QUERY,
) -> list[StudyQuestion]:
    """Return the questions of a study, each about one image and two of its things.

    The map of a thing is the paper's map of pixels: the answer is forced to name the thing, and its last token is
    explained by all boxes of its query. Images with fewer than two things of different names are passed over.

    Args:
        joint: The joint model.
        samples: The images, with their objects.
        count: The number of questions.
        seed: The seed of the choice of two things, and of the order of their maps.
        prompt, answer: The prompt, and the answer that is forced, with {} for the thing.
        query: The detector's text query, with {} for the thing.

    Raises:
        InputError: `count` is less than 1, or too few images have two things.
    """
    if count < 1:
        raise InputError(f"a study has at least one question, got {count}")
    found: list[StudyQuestion] = []
    for sample in samples.list:
        names = sorted({thing.name for thing in sample.things or ()})
        if len(names) < 2:
            continue
        rng = np.random.default_rng([seed, number_of(sample.name)])
        one, other = (names[int(i)] for i in rng.permutation(len(names))[:2])
        found.append(_question(joint, sample, (one, other), int(rng.integers(2)), (prompt, answer, query)))
        if len(found) == count:
            return found
    raise InputError(
        f"{len(found)} of {len(samples.list)} images show two things of different names, {count} are needed"
    )


def _question(
    joint: JointModel, sample: Sample, things: tuple[str, str], first: int, texts: tuple[str, str, str]
) -> StudyQuestion:
    prompt, answer, query = texts
    seen = joint.see(sample.image)
    drawn = []
    for name in things:
        ex = joint.explain(seen, prompt, answer.format(name), query=query.format(name))
        drawn.append(_drawn(seen.vision.picture, ex.box_weights(len(ex.tokens) - 1)))
    picture = seen.vision.picture.convert("RGB")
    picture.thumbnail((_SIDE, _SIDE))
    return StudyQuestion(sample.name, things, first, (picture, drawn[first], drawn[1 - first]))


def _drawn(picture: Image.Image, weights: BoxWeights) -> Image.Image:
    scale = min(1.0, _SIDE / max(picture.size))
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    values = weights.pixels(size).double().numpy()
    whole = (0.0, 0.0, float(picture.width), float(picture.height))
    return overlay(picture.convert("RGB"), values, whole, float(values.max()), _SIDE)


def study_page(questions: Sequence[StudyQuestion]) -> str:
    """Return the page of a study, which loads nothing from elsewhere, and from which readers save their answers."""
    shown = [
        {
            "things": list(question.things),
            "pictures": [_data(picture) for picture in question.pictures],
        }
        for question in questions
    ]
    return filled_page(_PAGE, shown)


def study_key(questions: Sequence[StudyQuestion]) -> str:
    """Return the key to the readers' answers, as JSON: for each question the thing whose map is the first."""
    key = [{"image": one.image, "things": list(one.things), "first": one.things[one.first]} for one in questions]
    return json.dumps(key, indent=1) + "\n"


def read_key(file: Path) -> list[dict[str, Any]]:
    """Read the key of a study.

    Raises:
        InputError: The file does not exist, or it is no key.
    """
    try:
        key = json.loads(file.read_text(encoding="utf-8"))
        if not key or not all(one["first"] in one["things"] and one["image"] for one in key):
            raise ValueError
    except FileNotFoundError:
        raise InputError(f"{file}: there is no such file") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{file}: is no key of a study, as `mllm-fast joint study` writes it") from None
    return key


def read_answers(files: Iterable[Path], count: int) -> dict[str, dict[int, str]]:
    """Read the readers' answers from CSV tables with the columns participant, question and answer.

    The questions count from 1. An answer is the thing that the reader takes the first map for.

    Returns:
        The answers by participant and question.

    Raises:
        InputError: A file does not exist, a column is missing, or there is no such question.
    """
    found: dict[str, dict[int, str]] = {}
    for file in files:
        for place, row in read_table(file, COLUMNS, "a table of answers"):
            number = row["question"].strip()
            if not number.isdigit() or not 1 <= int(number) <= count:
                raise InputError(f"{place}: questions are 1 to {count}, got {row['question']!r}")
            found.setdefault(row["participant"].strip(), {})[int(number)] = row["answer"].strip()
    if not found:
        raise InputError("there is no answer")
    return found


def study_report(key: Sequence[dict[str, Any]], answers: dict[str, dict[int, str]]) -> Report:
    """Return the share of right answers, for each question and in all."""
    right: list[list[bool]] = [
        [said[number] == one["first"] for said in answers.values() if number in said]
        for number, one in enumerate(key, 1)
    ]
    every = [hit for hits in right for hit in hits]
    share = sum(every) / len(every)
    says = [
        f"{len(answers)} readers gave {len(every)} answers to {len(key)} questions, of which"
        f" {percent(share, len(every))} % are right; chance is 50 %.",
        "In the paper's study the shares of its ten questions, in the supplement, have a mean of 94 %.",
    ]
    mean = lambda hits: sum(hits) / len(hits) if hits else float("nan")  # noqa: E731
    table = Table(
        "Right answers, % (95 % interval)",
        ["question", "image", "things", "right", "answers"],
        [
            [
                str(i),
                one["image"],
                " or ".join(one["things"]),
                percent(mean(hits), len(hits)) if hits else "-",
                str(len(hits)),
            ]
            for i, (one, hits) in enumerate(zip(key, right, strict=True), 1)
        ],
    )
    figures = {
        "readers": len(answers),
        "answers": len(every),
        "right": share,
        "interval": interval(share, len(every)),
        "questions": [{"right": mean(hits), "answers": len(hits)} for hits in right],
    }
    chart = Chart(
        "study",
        lambda figure: _draw(figure, [100 * mean(hits) for hits in right]),
        "The share of right answers to each question; the dotted line is chance.",
        (7.0, 3.2),
    )
    return Report("study", "Can people tell whose map is whose?", says, [table], [chart], figures)


def _data(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _draw(figure: Any, shares: Sequence[float]) -> None:
    axes = figure.subplots()
    axes.bar(range(1, len(shares) + 1), shares, color=COLORS[1])
    axes.axhline(50, color="#777777", linestyle=":")
    axes.set_xticks(range(1, len(shares) + 1))
    axes.set_xlabel("question")
    axes.set_ylabel("right answers (%)")
    axes.set_ylim(0, 103)
    axes.grid(axis="y", alpha=0.25)
