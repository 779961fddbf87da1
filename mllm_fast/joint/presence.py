"""Is it there? What the language model says, beside the detector's best box (arXiv 2405.14612, section 5)."""

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
    """Finds the nouns of a text."""

    def mentions(self, text: str) -> Sequence[Any]:
        """Its nouns in their order, each with a `name`."""


class Checked(NamedTuple):
    """A class in one image. yes: P(yes) / (P(yes) + P(no)) of the language model; score: the detector's largest, and
    its box; supported: whether that reaches the threshold."""

    name: str
    yes: float
    score: float
    box: tuple[float, float, float, float]
    supported: bool

    @property
    def hallucinated(self) -> bool:
        """The model says yes and no box supports it."""
        return self.yes >= 0.5 and not self.supported


def check_classes(
    joint: JointModel, seen: Seen, classes: Sequence[str], threshold: float = 0.3, eyes: str = "joint"
) -> list[Checked]:
    """Ask the model for each class, and the detector.

    eyes: "joint", the model answers from the detector's vision embedding; "own", from its own.

    Raises:
        InputError: no class, an empty one, or one longer than the detector's text window.
    """
    check_choice("eyes", eyes, EYES)
    check_names(classes)
    best = best_boxes(joint, seen, [QUERY.format(name) for name in classes])
    return [
        Checked(name, yes, found.score, found.box, found.score >= threshold)
        for name, yes, found in zip(classes, said_yes(joint, seen, classes, eyes), best, strict=True)
    ]


def said_yes(joint: JointModel, seen: Seen, classes: Sequence[str], eyes: str) -> list[float]:
    """P(yes) / (P(yes) + P(no)) of the model, asked for each class."""
    prompts, pictures = [QUESTION.format(name) for name in classes], [[seen.vision.picture]] * len(classes)
    with nullcontext() if eyes == "own" else joint.reading([seen] * len(classes)):
        return yes_probabilities(joint.vlm, pictures, prompts).tolist()


def check_names(classes: Sequence[str]) -> None:
    """Raise InputError unless there are classes to look for, each with a name."""
    if isinstance(classes, str) or not classes or not all(name.strip() for name in classes):
        raise InputError("no class was given; name what to look for: --class dog --class cat")


def best_boxes(joint: JointModel, seen: Seen, queries: Sequence[str]) -> list[Detection]:
    """The box of largest score of each query, whatever the score."""
    found = joint.boxes(seen, queries)
    scores, tokens = found.logits.sigmoid().max(0)
    width, height = seen.vision.picture.size
    corners = found.boxes[tokens].clamp_min(0).minimum(found.boxes.new_tensor([width, height] * 2))
    return [
        Detection(query, float(score), tuple(box.tolist()))
        for query, score, box in zip(queries, scores, corners, strict=True)
    ]


class Supported(NamedTuple):
    """A noun phrase of a description, its best box, and whether that reaches the threshold."""

    phrase: str
    box: Detection
    supported: bool


def check_text(joint: JointModel, seen: Seen, text: str, words: NounFinder, threshold: float = 0.3) -> list[Supported]:
    """Every noun of a text with the box that supports it best, in the text's order."""
    phrases = [mention.name for mention in words.mentions(text)]
    if not phrases:
        return []
    best = best_boxes(joint, seen, [QUERY.format(phrase) for phrase in phrases])
    return [Supported(phrase, box, box.score >= threshold) for phrase, box in zip(phrases, best, strict=True)]
