"""Measure whether maps of videos find the moment that is asked about, and what a video's moments are needed for.

The map of an answer's first word is compared with the interval of the asked event, and, where its masks are known, with
the object. Then moments are knocked out: those of the event, all others, and as many others at random. Last, the video
is compressed, with one budget for all frames and with one a frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from ...core.errors import InputError
from ...core.video import Video
from ...explain.explanation import Explanation
from ...explain.video_maps import VideoMaps
from ...knockout.rule import Knockout
from ...shapes.clips import FPS, Clip
from ..base import Evaluation, EvaluationOptions, mean_and_error
from ..registry import evaluation
from ..report import COLORS, Chart, Report, Table
from ..rows import Row
from ..samples import Sample
from ..videos import Event

if TYPE_CHECKING:
    from ...vlm import VLM

SHARES = (0.05, 0.2)
METHODS = ("logprob", "attention", "random")
_BUDGETS = ("all", "frame")
_CLOCK = 1e-3


@evaluation
class Moments(Evaluation):
    """An evaluation of where in a video, and when, a word comes from.

    A question has one row.

    Args:
        shares: The shares of the image tokens that contexts keep.
        max_new_tokens: The longest answer, in tokens.
    """

    name: ClassVar[str] = "moments"
    title: ClassVar[str] = "Which moment of a video, and where in it"
    of_videos: ClassVar[bool] = True

    @classmethod
    def from_options(cls, options: EvaluationOptions) -> Evaluation:
        return cls(options.shares or SHARES, options.max_new_tokens or 16)

    def __init__(self, shares: Sequence[float] = SHARES, max_new_tokens: int = 16):
        self.settings: dict[str, Any] = {"shares": sorted(set(shares)), "max_new_tokens": max_new_tokens}

    def rows(self, vlm: VLM, sample: Sample) -> list[Row]:
        source = sample.source
        video = Video(source.frames, frame_rate=FPS) if isinstance(source, Clip) else Video(source)
        (read,) = vlm.prompts.load(video)
        return [self._row(vlm, read, event, number) for number, event in enumerate(sample.events)]

    def _row(self, vlm: VLM, video: Any, event: Event, number: int) -> Row:
        limit = self.settings["max_new_tokens"]
        ex = vlm.explain(video, event.question, max_new_tokens=limit)
        maps = ex.video()
        inside = [
            moment.seconds[0] <= event.seconds[1] + _CLOCK and moment.seconds[1] >= event.seconds[0] - _CLOCK
            for moment in maps.moments
        ]
        if not any(inside):
            raise InputError(f"no frame that the model read shows {event.seconds[0]:g} to {event.seconds[1]:g} s")
        row: Row = {
            "task": event.task,
            "question": event.question,
            "said": ex.text,
            "right": None if event.answer is None else ex.text == event.answer,
            "whole": all(inside),
            "maps": {method: _found(maps, method, inside, event) for method in METHODS},
        }
        if not row["whole"]:
            row["knockout"] = _knocked_out(vlm, video, event, ex, inside, number)
        row["contexts"] = self._contexts(vlm, video, event)
        return row

    def _contexts(self, vlm: VLM, video: Any, event: Event) -> list[Row]:
        """Return the answers from contexts that keep a share of the tokens, and how many moments they keep."""
        found = []
        for share in self.settings["shares"]:
            for budget in _BUDGETS:
                context = vlm.compress(video, share, score="query", budget=budget)
                said = context.ask(event.question, max_new_tokens=self.settings["max_new_tokens"]).text
                kept = (context.kept_counts() > 0).float().mean()
                right = None if event.answer is None else said == event.answer
                found.append({"keep": share, "budget": budget, "said": said, "right": right, "moments": float(kept)})
        return found

    def findings(self, rows: dict[str, list[Row]]) -> Report:
        every = [row for one in rows.values() for row in one]
        parts = [row for row in every if not row["whole"]]
        figures: dict[str, Any] = {"videos": len(rows), "questions": len(every), "tasks": {}, "maps": {}}
        for task in dict.fromkeys(row["task"] for row in every):
            mine = [row for row in every if row["task"] == task]
            figures["tasks"][task] = {"questions": len(mine), "right": _share(row["right"] for row in mine)} | {
                name: _share(row["maps"]["logprob"][name] for row in mine if not (row["whole"] and name == "in_time"))
                for name in ("in_time", "on_object")
            }
        for method in METHODS:
            figures["maps"][method] = {
                "in_time": _share(row["maps"][method]["in_time"] for row in parts),
                "mass_in_time": _share(row["maps"][method]["mass"] for row in parts),
                "on_object": _share(row["maps"][method]["on_object"] for row in every),
            }
        closed = [row["knockout"] for row in parts]
        figures["knockout"] = {
            name: {
                "fall": _share(one[name]["fall"] for one in closed),
                "changed": _share(one[name]["changed"] for one in closed),
            }
            for name in ("event", "others", "random")
            if closed
        }
        figures["contexts"] = [
            {
                "keep": one["keep"],
                "budget": one["budget"],
                "right": _share(row["contexts"][i]["right"] for row in every),
                "moments": _share(row["contexts"][i]["moments"] for row in every),
            }
            for i, one in enumerate(every[0]["contexts"])
        ]
        return Report(self.name, self.title, _says(figures), _tables(figures), [_chart(figures)], figures)


def _found(maps: VideoMaps, method: str, inside: list[bool], event: Event) -> Row:
    """Return whether the map of an answer's first word is highest in the event's interval, and on its object."""
    shares = maps.shares(0, method)
    moment, box = maps.peak(0, method)
    in_time = inside[maps.moments.index(moment)]
    on_object = None
    if event.masks is not None:
        left, top, right, bottom = (round(edge) for edge in box)
        on_object = any(bool(event.masks[frame][top:bottom, left:right].any()) for frame in moment.frames)
    mass = float(shares[torch.tensor(inside)].sum())
    return {"in_time": in_time, "mass": mass if float(shares.sum()) > 0 else None, "on_object": on_object}


def _knocked_out(
    vlm: VLM, video: Any, event: Event, ex: Explanation, inside: list[bool], number: int
) -> dict[str, Row]:
    """Return how far log p of the first word falls, and whether the answer changes, without some moments."""
    images = ex.layout.videos[0]
    own = [image for image, here in zip(images, inside, strict=True) if here]
    others = [image for image, here in zip(images, inside, strict=True) if not here]
    rng = np.random.default_rng([number, len(images)])
    random = sorted(rng.permutation(others)[: len(own)].tolist())
    found = {}
    for name, closed in (("event", own), ("others", others), ("random", random)):
        rule = Knockout("+".join(f"image:{image}" for image in closed), "query+generated")
        said = vlm.explain(video, event.question, ex.token_ids[:1], knockout=rule)
        fall = _log_prob(ex) - _log_prob(said)
        answer = vlm.generate(video, event.question, knockout=rule, max_new_tokens=len(ex.token_ids) + 1).text
        found[name] = {"moments": len(closed), "fall": fall, "changed": answer != ex.text}
    return found


def _log_prob(ex: Explanation) -> float:
    """Return log p of an answer's first token."""
    with torch.no_grad():
        logits = ex.text_model.logits(ex.text_model.norm(ex.trace.final[:1]))[0].float()
    return float(torch.log_softmax(logits, -1)[ex.token_ids[0]])


def _share(values: Any) -> float | None:
    """Return the mean of values of which some are not known; None if none is."""
    known = [float(value) for value in values if value is not None]
    return mean_and_error(known)[0] if known else None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _says(figures: dict[str, Any]) -> list[str]:
    ours, attention = figures["maps"]["logprob"], figures["maps"]["attention"]
    says = [
        f"{figures['questions']} questions about {figures['videos']} videos. The log-probability map of the answer's"
        f" first word is highest in the asked interval for {_percent(ours['in_time'])} % of those whose interval is not"
        f" the whole video (mean attention: {_percent(attention['in_time'])} %), and"
        f" {_percent(ours['mass_in_time'])} % of what it holds lies there."
    ]
    if ours["on_object"] is not None:
        says.append(f"It is highest on the asked object for {_percent(ours['on_object'])} %.")
    closed = figures["knockout"]
    if closed:
        says.append(
            f"Without the event's moments the answer changes for {_percent(closed['event']['changed'])} %, without all"
            f" other moments for {_percent(closed['others']['changed'])} %."
        )
    return says


def _tables(figures: dict[str, Any]) -> list[Table]:
    tasks = Table(
        "By kind of question, %",
        ["kind", "questions", "right", "highest in the interval", "highest on the object"],
        [
            [task or "all", str(one["questions"]), *(_percent(one[name]) for name in ("right", "in_time", "on_object"))]
            for task, one in figures["tasks"].items()
        ],
        "Intervals that are the whole video are left out.",
    )
    maps = Table(
        "By map, %",
        ["map", "highest in the interval", "share of the map there", "highest on the object"],
        [
            [method, *(_percent(one[name]) for name in ("in_time", "mass_in_time", "on_object"))]
            for method, one in figures["maps"].items()
        ],
    )
    closed = Table(
        "Knockout of moments (to query and answer, all layers)",
        ["closed", "log p falls by", "answers that change, %"],
        [
            [name, "-" if one["fall"] is None else f"{one['fall']:.2f}", _percent(one["changed"])]
            for name, one in figures["knockout"].items()
        ],
        "Random: as many moments as the event has, from the others.",
    )
    contexts = Table(
        "From compressed contexts, %",
        ["kept", "budget", "right", "moments of which a layer keeps a token"],
        [
            [f"{100 * one['keep']:g}", one["budget"], _percent(one["right"]), _percent(one["moments"])]
            for one in figures["contexts"]
        ],
    )
    return [tasks, maps, closed, contexts]


def _chart(figures: dict[str, Any]) -> Chart:
    def draw(figure: Any) -> None:
        axes = figure.subplots()
        names = ("in_time", "mass_in_time", "on_object")
        for i, (method, one) in enumerate(figures["maps"].items()):
            at = np.arange(len(names)) + 0.26 * (i - 1)
            axes.bar(at, [100 * (one[name] or 0) for name in names], 0.24, color=COLORS[i], label=method)
        axes.set_xticks(
            range(len(names)), ["highest in\nthe interval", "share in\nthe interval", "highest on\nthe object"]
        )
        axes.set_ylabel("%")
        axes.set_ylim(0, 103)
        axes.grid(axis="y", alpha=0.25)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)

    caption = "How often maps of videos are highest in the asked interval, their share there, and on the asked object."
    return Chart("moments", draw, caption)
