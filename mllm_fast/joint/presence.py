"""Check whether things are in an image, by the language model and by the detector (arXiv 2405.14612, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

from ..core.errors import InputError, check_choice
from ..runtime.likelihood import yes_probabilities
from .detector import Detection
from .model import JointModel, Seen

QUESTION, QUERY = "is there a {}?", "a photo of a {}"
EYES = ("own", "joint")


class NounFinder(Protocol):
    """An object that finds the nouns of a text."""

    def mentions(self, text: str) -> Sequence[Any]:
        """Return the nouns of the text in their order, each with a `name`."""


class Checked(NamedTuple):
    """The check of one class in one image.

    Attributes:
        name: The class.
        yes: P(yes) / (P(yes) + P(no)) of the language model.
        score: The detector's largest score for the class.
        box: The box with that score.
        supported: Whether the score reaches the threshold.
    """

    name: str
    yes: float
    score: float
    box: tuple[float, float, float, float]
    supported: bool

    @property
    def hallucinated(self) -> bool:
        """Whether the model says yes although no box supports it."""
        return self.yes >= 0.5 and not self.supported


def check_classes(
    joint: JointModel, seen: Seen, classes: Sequence[str], threshold: float = 0.3, eyes: str = "joint"
) -> list[Checked]:
    """Ask the language model and the detector whether each class is in an image.

    Args:
        joint: The joint model.
        seen: The image.
        classes: The names of the classes.
        threshold: The lowest score of a box that supports a class.
        eyes: With "joint", the language model answers from the detector's vision embedding. With "own", it answers from
            its own.

    Returns:
        One check per class.

    Raises:
        InputError: If there is no class, or if one is empty or longer than the detector's text window.
    """
    check_choice("eyes", eyes, EYES)
    check_names(classes)
    best = best_boxes(joint, seen, [QUERY.format(name) for name in classes])
    return [
        Checked(name, yes, found.score, found.box, found.score >= threshold)
        for name, yes, found in zip(classes, said_yes(joint, seen, classes, eyes), best, strict=True)
    ]


def said_yes(joint: JointModel, seen: Seen, classes: Sequence[str], eyes: str) -> list[float]:
    """Return P(yes) / (P(yes) + P(no)) of the language model, asked about each class."""
    prompts, pictures = [QUESTION.format(name) for name in classes], [[seen.vision.picture]] * len(classes)
    with nullcontext() if eyes == "own" else joint.reading([seen] * len(classes)):
        return yes_probabilities(joint.vlm, pictures, prompts).tolist()


def check_names(classes: Sequence[str]) -> None:
    """Raise InputError unless there are classes to look for, each with a name."""
    if isinstance(classes, str) or not classes or not all(name.strip() for name in classes):
        raise InputError("no class was given; name what to look for: --class dog --class cat")


def best_boxes(joint: JointModel, seen: Seen, queries: Sequence[str]) -> list[Detection]:
    """Return the box with the largest score of each query, however low that score is."""
    found = joint.boxes(seen, queries)
    scores, tokens = found.logits.sigmoid().max(0)
    width, height = seen.vision.picture.size
    corners = found.boxes[tokens].clamp_min(0).minimum(found.boxes.new_tensor([width, height] * 2))
    return [
        Detection(query, float(score), tuple(box.tolist()))
        for query, score, box in zip(queries, scores, corners, strict=True)
    ]


class Supported(NamedTuple):
    """A noun phrase of a description, its best box, and whether the score of that box reaches the threshold."""

    phrase: str
    box: Detection
    supported: bool


def check_text(joint: JointModel, seen: Seen, text: str, words: NounFinder, threshold: float = 0.3) -> list[Supported]:
    """Return every noun of a text with its best box, in the order of the text."""
    phrases = [mention.name for mention in words.mentions(text)]
    if not phrases:
        return []
    best = best_boxes(joint, seen, [QUERY.format(phrase) for phrase in phrases])
    return [Supported(phrase, box, box.score >= threshold) for phrase, box in zip(phrases, best, strict=True)]
