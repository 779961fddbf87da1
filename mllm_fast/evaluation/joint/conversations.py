"""Put conversations about an image side by side (arXiv 2405.14612, supplement, section 2, figures 1 to 4).

The columns are people's (or a dataset's) answers, the language model's alone, and those through a joint model. Each
model goes on from its own earlier answers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ...core.errors import InputError
from ...core.images import load_image
from ...runtime.answer import answer_of
from ...shapes.questions import TASKS, ask
from ..base import mean_and_error
from ..report import Report, Table, cell
from ..rows import Row
from ..samples import Sample, Samples, scenes
from .base import JointEvaluation
from .bias import words_kept

if TYPE_CHECKING:
    from ...joint.model import JointModel
    from ...models.media import Turn
    from ...vlm import VLM

GIVEN, OWN, JOINT = "the dataset", "the language model alone", "through the joint model"
_COLUMNS = ("question", GIVEN, OWN, JOINT)
_SHOWN = 10  # conversations in the report


@dataclass(frozen=True)
class Conversation(Sample):
    """A sample with the questions of a conversation and the answers that are given to them.

    Attributes:
        turns: Each question and its given answer.
    """

    turns: tuple[tuple[str, str], ...] = ()


class Conversations(JointEvaluation):
    """An evaluation of conversations about images, with and without the joint model.

    An image has one row for each turn: the question, the given answer, and the answers of the language model alone and
    through the joint model, of which each has the model's own earlier answers before it.

    Args:
        joint: The folder of the joint model.
        max_new_tokens: The largest number of tokens in an answer.
    """

    name: ClassVar[str] = "conversations"
    title: ClassVar[str] = "Conversations side by side"

    def __init__(self, joint: str, max_new_tokens: int = 64):
        super().__init__(joint, max_new_tokens=max_new_tokens)

    def rows(self, vlm: VLM, sample: Sample) -> list[Row]:
        if not isinstance(sample, Conversation):
            raise InputError(f"{sample.name}: no conversation is known about it")
        joint = self.joint(vlm)
        questions = [question for question, _ in sample.turns]
        own, through = (self._conversation(joint, sample, questions, eyes == JOINT) for eyes in (OWN, JOINT))
        return [
            {"question": question, GIVEN: given, OWN: one, JOINT: other}
            for (question, given), one, other in zip(sample.turns, own, through, strict=True)
        ]

    def _conversation(self, joint: JointModel, sample: Sample, questions: Sequence[str], through: bool) -> list[str]:
        vlm = joint.vlm
        picture = load_image(sample.image)
        seen = joint.see(picture) if through else None
        settings = vlm.settings(self.settings["max_new_tokens"])
        turns: list[Turn] = []
        for i, question in enumerate(questions):
            turns.append(("user", [None, question] if i == 0 else [question]))
            inputs, layout = vlm.prompts.conversation([picture], turns)
            with nullcontext() if seen is None else joint.reading([seen]):
                output = vlm.run(inputs, settings)
            text = answer_of(output[0], layout, vlm.processor.tokenizer, settings).text
            turns.append(("assistant", [text]))
        return [str(parts[0]) for role, parts in turns if role == "assistant"]

    def findings(self, rows: dict[str, list[Row]]) -> Report:
        every = [row for one in rows.values() for row in one]
        same = mean_and_error([float(row[OWN] == row[JOINT]) for row in every])
        shared = {name: mean_and_error([words_kept(row[GIVEN], row[name]) for row in every]) for name in (OWN, JOINT)}
        says = [
            f"{len(every)} turns of {len(rows)} conversations. Through the joint model {same[0]:.1%} of the answers are"
            " the language model's own, to the letter."
        ]
        table = Table(
            "Words shared with the given answers (F1, %), mean ± standard error over turns",
            ["answers", "F1"],
            [[name, cell(value, 1, 100)] for name, value in shared.items()],
        )
        shown = [
            Table(
                name,
                ["question", GIVEN, OWN, JOINT],
                [[row["question"], row[GIVEN], row[OWN], row[JOINT]] for row in one],
            )
            for name, one in list(rows.items())[:_SHOWN]
        ]
        figures = {
            "conversations": len(rows),
            "turns": len(every),
            "same": same[0],
            "f1": {name: value[0] for name, value in shared.items()},
        }
        return Report(self.name, self.title, says, [table, *shown], [], figures)


def llava_conversations(file: Path, pictures: Path, count: int | None = None) -> Samples:
    """Read conversations in the format of LLaVA-Instruct.

    The file is a JSON list of {"id": ..., "image": ..., "conversations": [{"from": "human" or "gpt", "value": ...}]}.

    Args:
        file: The file.
        pictures: The folder of the images.
        count: The number of conversations to take, in order; None takes all.

    Raises:
        InputError: The file does not exist, or it has another format.
    """
    try:
        entries: list[Any] = json.loads(file.read_text(encoding="utf-8"))
        found: list[Sample] = []
        for entry in entries[:count]:
            said = [(one["from"], str(one["value"]).replace("<image>", "").strip()) for one in entry["conversations"]]
            asked = [text for role, text in said if role == "human"]
            given = [text for role, text in said if role == "gpt"]
            problem = "" if asked and len(asked) == len(given) else "its questions and answers do not go in pairs"
            name = f"{entry['id']} {entry['image']}"
            turns = () if problem else tuple(zip(asked, given, strict=True))
            found.append(
                Conversation(name, pictures / entry["image"], problem=problem and f"{name}: {problem}", turns=turns)
            )
    except FileNotFoundError:
        raise InputError(f"{file}: there is no such file") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not in LLaVA-Instruct's format ({type(error).__name__} {error})") from None
    if not found:
        raise InputError(f"{file}: holds no conversation")
    return Samples(found, {"conversations": str(file), "pictures": str(pictures)})


def scene_conversations(count: int, seed: int = 0, turns: int = 3) -> Samples:
    """Return generated scenes, each with a conversation of `turns` questions about it."""
    found: list[Sample] = []
    for number, sample in enumerate(scenes(count, seed).list):
        assert sample.scene is not None
        rng = np.random.default_rng([seed, number, 2])
        asked = [ask(sample.scene, rng, task) for task in rng.permutation(TASKS)]
        pairs = tuple((one.text, one.answer) for one in asked if one is not None)[:turns]
        found.append(Conversation(sample.name, sample.source, sample.things, turns=pairs))
    return Samples(found, {"scene conversations": seed, "turns": turns})
