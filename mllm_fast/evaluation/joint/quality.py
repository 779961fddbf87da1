"""Measure how much is lost through W: compare answers and embeddings of joint models with the language model's own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...core.errors import InputError
from ...joint.image_features import own_features
from ...joint.model import Seen
from ...joint.precision import Found, judge_boxes
from ...shapes.questions import ask, describe
from ..base import mean_and_error
from ..judges.endpoint import Unanswered, cost
from ..report import COLORS, Chart, Report, Table, cell
from ..rows import Row
from ..samples import Sample, Thing
from .base import JointEvaluation, number_of, percent, weights_digest

if TYPE_CHECKING:
    from ...vlm import VLM
    from .caption_score import CaptionJudge

OWN = "the language model alone"
TRUTH, PEOPLE = "what is true", "people"
_TASKS = ("color", "shape")
_PRECISION = 0.9


class JointQuality(JointEvaluation):
    """An evaluation of what is lost when the language model sees an image through W.

    An image has rows of four kinds. The first has a model's answer to a question ("said" by "model", and "truth" where
    it is known). The second has the distance of W's embeddings from the language model's own. The third has the
    detector's boxes, if the objects of the image are known. The fourth has a judge's score of a description, 1 to 10.

    Args:
        joints: The folders of the joint models. The first one gives the boxes.
        classes: The names of the objects that the detector looks for, as in `Sample.things`.
        question: The question for images that are not generated, and the prompt of the descriptions.
        judge: The judge that scores descriptions; None for no scores.
        max_new_tokens: The largest number of tokens in an answer.
        captions: A caption by people for each image, by the sample's name; the judge scores it, too.
        price: The price of a million of the judge's tokens, in dollars.
    """

    name: ClassVar[str] = "joint"
    title: ClassVar[str] = "What is lost through one vision embedding?"

    def __init__(
        self,
        joints: Sequence[str],
        classes: Sequence[str] = (),
        question: str = "Describe the image.",
        judge: CaptionJudge | None = None,
        max_new_tokens: int = 64,
        captions: Mapping[str, str] | None = None,
        price: float | None = None,
    ):
        if not joints:
            raise InputError("give at least one joint model")
        self.joints, self.judge, self.price = tuple(joints), judge, price
        self.captions = dict(captions or {})
        super().__init__(
            joints[0],
            all=[[name, weights_digest(name)] for name in joints],
            classes=list(classes),
            question=question,
            judge=None if judge is None else judge.settings,
            captions=hashlib.sha256(repr(sorted(self.captions.items())).encode()).hexdigest()[:12],
            max_new_tokens=max_new_tokens,
        )

    def rows(self, vlm: VLM, sample: Sample) -> list[Row]:
        seen = {name: self.joint(vlm, name).see(sample.image) for name in self.joints}
        first = seen[self.joints[0]]
        found = self._answers(vlm, sample, seen)
        alone = self.joint(vlm).vlm  # it sees the same part of an image
        inputs, _, _ = alone.prompts.prepare([[first.vision.picture]], ["?"])
        with torch.inference_mode():
            own = own_features(alone, inputs)[0].float()
        found += [self._distance(vlm, name, one, own) for name, one in seen.items()]
        if sample.things is not None and self.settings["classes"]:
            found.append(self._boxes(vlm, first, sample.things))
        if self.judge is not None:
            found += self._scores(self.judge, vlm, sample, seen)
        return found

    def _answers(self, vlm: VLM, sample: Sample, seen: dict[str, Seen]) -> list[Row]:
        questions: list[tuple[str, str | None]] = []
        if sample.scene is not None:
            rng = np.random.default_rng(number_of(sample.name))
            asked = [ask(sample.scene, rng, task) for task in _TASKS]
            questions = [(one.text, one.answer) for one in asked if one is not None]
            tasks = [one.task for one in asked if one is not None]
        else:
            questions, tasks = [(self.settings["question"], None)], ["free"]
        texts, rows = [text for text, _ in questions], []
        options = {"max_new_tokens": self.settings["max_new_tokens"]}
        picture = seen[self.joints[0]].vision.picture
        said = {OWN: self.joint(vlm).vlm.generate([picture] * len(texts), texts, **options) if texts else []}
        for name, one in seen.items():
            said[name] = self.joint(vlm, name).generate([one] * len(texts), texts, **options) if texts else []
        for model, answers in said.items():
            for task, (text, truth), answer in zip(tasks, questions, answers, strict=True):
                rows.append({"task": task, "model": model, "question": text, "said": answer.text, "truth": truth})
        return rows

    def _distance(self, vlm: VLM, name: str, seen: Seen, own: Tensor) -> Row:
        with torch.inference_mode():
            mine = self.joint(vlm, name).image_embeddings(seen).to(own)
        error, spread = (mine - own).square().sum(), (own - own.mean(0)).square().sum()
        cosine = torch.cosine_similarity(mine, own, dim=-1).mean()
        return {"model": name, "distance": float((error / spread).sqrt()), "cosine": float(cosine)}

    def _boxes(self, vlm: VLM, seen: Seen, things: Sequence[Thing]) -> Row:
        classes: list[str] = self.settings["classes"]
        owl = self.joint(vlm).owl
        there = [(classes.index(thing.name), box_of(thing.mask)) for thing in things if thing.name in classes]
        queries = [f"a photo of a {name}" for name in classes]
        found = owl.boxes(seen.vision, queries)
        return {"boxes": judge_boxes(found.logits, found.boxes, there), "things": len(there)}

    def _scores(self, judge: CaptionJudge, vlm: VLM, sample: Sample, seen: dict[str, Seen]) -> list[Row]:
        prompt, options = self.settings["question"], {"max_new_tokens": self.settings["max_new_tokens"]}
        picture = seen[self.joints[0]].vision.picture
        captions = {OWN: self.joint(vlm).vlm.generate(picture, prompt, **options).text}
        if sample.scene is not None:
            captions = {TRUTH: describe(sample.scene)} | captions
        elif sample.name in self.captions:
            captions = {PEOPLE: self.captions[sample.name]} | captions
        for name, one in seen.items():
            captions[name] = self.joint(vlm, name).generate(one, prompt, **options).text
        rows: list[Row] = []
        for model, caption in captions.items():
            try:
                score, paid = judge.score(picture, caption)
                rows.append({"model": model, "caption": caption, "score": score, "paid": paid})
            except Unanswered as error:
                rows.append({"model": model, "caption": caption, "unjudged": str(error), "paid": error.tokens})
        return rows

    def findings(self, rows: dict[str, list[Row]]) -> Report:
        every = [row for one in rows.values() for row in one]
        figures: dict[str, Any] = {"pictures": len(rows)}
        says: list[str] = []
        tables: list[Table] = []
        charts: list[Chart] = []
        if any(row.get("truth") is not None for row in every):
            tables.append(self._accuracy(every, figures, says))
        if any("said" in row and row["truth"] is None for row in every):
            tables.append(self._same(rows, figures))
        tables.append(self._distances(every, figures))
        if sum(row.get("things", 0) for row in every):
            charts.append(_detector(every, figures, says))
        if self.judge is not None:
            tables.append(self._captions(every, figures, says))
        return Report(self.name, self.title, says, tables, charts, figures)

    def _accuracy(self, every: list[Row], figures: dict[str, Any], says: list[str]) -> Table:
        known = [row for row in every if row.get("truth") is not None]
        tasks = list(dict.fromkeys(row["task"] for row in known))
        right: dict[str, dict[str, list[bool]]] = {model: {task: [] for task in tasks} for model in (OWN, *self.joints)}
        for row in known:
            right[row["model"]][row["task"]].append(row["said"] == row["truth"])
        accuracy = {model: {task: float(np.mean(hits)) for task, hits in one.items()} for model, one in right.items()}
        figures["accuracy"] = accuracy
        own = accuracy[OWN]
        parts = [
            f"{name}: {', '.join(f'{task} {accuracy[name][task] / own[task]:.1%}' for task in tasks if own[task])}"
            for name in self.joints
        ]
        says.append(f"Of the language model's own right answers through W there are {'; '.join(parts)}.")
        return Table(
            "Right answers, % (95 % interval)",
            ["model", *tasks],
            [
                [model, *(percent(float(np.mean(hits)), len(hits)) for hits in one.values())]
                for model, one in right.items()
            ],
        )

    def _same(self, rows: dict[str, list[Row]], figures: dict[str, Any]) -> Table:
        """Return how often joint models give the language model's own answer, for questions without a known truth."""
        same: dict[str, list[bool]] = {name: [] for name in self.joints}
        for one in rows.values():
            free = [row for row in one if "said" in row and row["truth"] is None]
            own = {row["question"]: row["said"] for row in free if row["model"] == OWN}
            for row in free:
                if row["model"] != OWN:
                    same[row["model"]].append(row["said"] == own[row["question"]])
        figures["same"] = {name: float(np.mean(hits)) for name, hits in same.items()}
        return Table(
            "The language model's own answer to the letter, % (95 % interval)",
            ["model", "same"],
            [[name, percent(figures["same"][name], len(hits))] for name, hits in same.items()],
        )

    def _distances(self, every: list[Row], figures: dict[str, Any]) -> Table:
        by = {name: [row for row in every if "distance" in row and row["model"] == name] for name in self.joints}
        figures["distance"] = {name: mean_and_error([row["distance"] for row in by[name]])[0] for name in by}
        return Table(
            "W's embeddings and the language model's own, mean ± standard error over images",
            ["joint model", "distance", "cosine"],
            [
                [name, *(cell(mean_and_error([row[key] for row in by[name]]), 3) for key in ("distance", "cosine"))]
                for name in by
            ],
            "Distance: of 0 they are the same, at 1 W is as far off as the mean over the image's tokens would be.",
        )

    def _captions(self, every: list[Row], figures: dict[str, Any], says: list[str]) -> Table:
        scored = [row for row in every if "score" in row]
        by = {m: [row["score"] for row in scored if row["model"] == m] for m in (TRUTH, PEOPLE, OWN, *self.joints)}
        figures["captions"] = {name: mean_and_error(values)[0] for name, values in by.items() if values}
        open_ = sum("unjudged" in row for row in every)
        if open_:
            says.append(f"{open_} descriptions are not judged and count nowhere.")
        says.append(f"The judge took {cost(sum(row.get('paid', 0) for row in every), self.price)}.")
        return Table(
            "A judge's score of descriptions, 1 to 10, mean ± standard error",
            ["description by", "score", "pictures"],
            [[name, cell(mean_and_error(values)), str(len(values))] for name, values in by.items() if values],
            "The paper's, by GPT-4: 6.9 of people's descriptions, 7.0 of LLaVA's, and 6.1, 5.6 and 3.2 of joint models"
            " with a deep MLP, LLaVA's MLP and a transformer as W.",
        )


def _detector(every: list[Row], figures: dict[str, Any], says: list[str]) -> Chart:
    boxes = [row for row in every if "boxes" in row]
    found = Found.of([row["boxes"] for row in boxes], sum(row["things"] for row in boxes))
    recall, threshold = found.recall_at(_PRECISION)
    precise = found.average_precision()
    figures["detector"] = {
        "things": found.things,
        "recall": recall,
        "threshold": threshold,
        "average_precision": precise,
    }
    says.append(
        f"The detector finds {recall:.1%} of {found.things} things at a precision of {_PRECISION:.0%} (score"
        f" {threshold:.2f} or more, overlap with the thing one half or more); average precision {precise:.3f}."
    )
    caption = "Precision over recall of the detector's boxes, at all thresholds."
    return Chart("boxes", lambda figure: _draw(figure, found), caption, (5.5, 4.0))


def box_of(mask: np.ndarray) -> Tensor:
    """Return the box around a mask.

    Args:
        mask: The mask, bool [height, width].

    Returns:
        left, top, right, bottom in pixels, float32 [4].

    Raises:
        InputError: The mask is empty.
    """
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        raise InputError("the mask of a thing is empty")
    return torch.tensor([cols[0], rows[0], cols[-1] + 1, rows[-1] + 1], dtype=torch.float32)


def _draw(figure: Any, found: Found) -> None:
    axes = figure.subplots()
    _, precisions, recalls = found.curve()
    axes.plot(100 * recalls, 100 * precisions, color=COLORS[1])
    axes.axhline(100 * _PRECISION, color="#777777", linestyle=":")
    axes.set_xlabel("recall (% of things)")
    axes.set_ylabel("precision (% of boxes)")
    axes.set_xlim(0, 103)
    axes.set_ylim(0, 103)
    axes.grid(alpha=0.25)
