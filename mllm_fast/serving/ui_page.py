"""The event handlers of the left column of the browser tool's page: questions, links, and what a browser kept.

A handler returns the components that it changes. What goes wrong is shown in words where it happened, and everything
else stays as it was.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..core.assets import SAMPLE
from ..core.errors import InputError
from ..core.video import LoadedVideo
from ..explain.registry import DEFAULT
from .logs import Log
from .ui_backend import Answered, Heard, UIBackend
from .ui_inputs import NAMES, Inputs, Limits, of_query, of_store, query_of
from .ui_map import Changes, MapPage, problem
from .ui_parts import Parts, methods
from .ui_text import answer_html, told_html

# what is not rendered at all, Gradio can fail to show when its updates follow each other quickly
_HIDDEN: dict[str, Any] = gr.update(visible="hidden")
_NUMBERS = itertools.count(1)


@dataclass(frozen=True)
class Wanted:
    """What the page holds beside its controls.

    Attributes:
        question, word: The question and the word that a link or the browser's store names.
        video: The path of the uploaded video, which is asked about in place of an image.
    """

    question: str = ""
    word: int = -1
    video: str | None = None


class Page:
    """The event handlers.

    Args:
        tool: Runs the model.
        parts: The components of the page.
        maps: Shows the map of a word.
        limits: What the controls accept.
        log: Writes the errors.
    """

    def __init__(self, tool: UIBackend, parts: Parts, maps: MapPage, limits: Limits, log: Log):
        self._maps, self._tool, self._limits, self._log = maps, tool, limits, log
        self._parts, self._controls, self._results = parts, parts.controls, parts.results

    async def ask(self, file: str | None, wanted: Wanted | None, *values: Any) -> AsyncIterator[Changes]:
        """Answer the question: normally, with attention knocked out, and from a context, as far as requested.

        Args:
            file: The path of the image.
            wanted: What the page holds beside its controls.
            values: The values of `Inputs`, up to the method.
        """
        wanted = wanted or Wanted()
        video = wanted.video
        controls, stop = self._controls, threading.Event()
        yield {
            self._parts.running: stop,
            controls.status: told_html("Reading the image and the question …"),
            controls.problem: "",
            controls.notice: "",
            controls.forget: _HIDDEN,
            controls.ask: "Ask",
            controls.stop: gr.update(visible=True),
        }
        try:
            if file is None and video is None:
                raise InputError("Give an image first: upload one, paste one, or take the sample.")
            if file is not None and video is not None:
                raise InputError("Give an image or a video, not both: remove one of them.")
            asked = Inputs.checked(_given(values), self._limits)
            if not asked.question.strip():
                raise InputError("Ask something about the image.")
            picture: Any = await (self._tool.picture(Path(file)) if file else self._tool.video(Path(str(video))))
            word = wanted.word if wanted.question == asked.question else -1
            async for changes in self._answers(picture, asked, word, stop):
                yield changes
            yield {self._parts.wanted: Wanted(video=video)}
        except Exception as error:
            yield {controls.problem: problem(error, self._log)}
        yield {controls.status: "", controls.stop: _HIDDEN}

    async def _answers(
        self, picture: Image.Image | LoadedVideo, asked: Inputs, word: int, stop: threading.Event
    ) -> AsyncIterator[Changes]:
        results, tool, number = self._results, self._tool, next(_NUMBERS)
        found: Answered | None = None
        begun = False
        async for heard in tool.answer(picture, asked, stop):
            found = heard.done
            if not begun:
                yield self._cleared()
                begun = True
            if found is None:
                yield self._growing(heard, number)
        assert found is not None
        yield await self._whole(found, asked.method, word, number)
        if asked.knockout and not stop.is_set():
            title = "With attention knocked out"
            async for text in tool.impaired(picture, asked, stop):
                yield {results.other: gr.update(value=answer_html(title, text), visible=True)}
            if stop.is_set():
                yield {results.other: answer_html(title, text, "stopped")}
        if asked.keep and not stop.is_set():
            text, facts, patches = await tool.compressed(picture, asked, stop)
            note = f"stopped; {facts}" if stop.is_set() else facts
            yield {
                results.small: gr.update(value=answer_html("From the kept patches", text, note), visible=True),
                results.kept: gr.update(value=patches, visible=True),
            }

    def _cleared(self) -> Changes:
        """Return the page without the answer before."""
        results = self._results
        hidden = [results.other, results.small, results.kept, results.heads, results.layer, results.method]
        hidden += [results.check, results.report, results.numbers, results.moment]
        texts = [results.trouble, results.meaning, results.lens, results.verdict]
        return {
            self._parts.answered: None,
            self._controls.status: told_html("Answering …"),
            **dict.fromkeys(hidden, _HIDDEN),
            **dict.fromkeys(texts, ""),
        }

    def _growing(self, heard: Heard, number: int) -> Changes:
        results, last = self._results, len(heard.tokens) - 1
        return {
            results.answer: answer_html("Answer", heard.text, asked=number),
            results.words: gr.update(choices=_numbered(heard.tokens), value=last, visible=True, interactive=False),
            results.map: gr.update(value=heard.map, visible=True),
        }

    async def _whole(self, found: Answered, method: str, word: int, number: int) -> Changes:
        ex, results = found.explanation, self._results
        last = len(ex.tokens) - 1
        token = last if word < 0 else min(word, last)
        offered = methods(found.joint)
        notes = [found.note] if found.note else []
        if method not in _names(offered):
            notes.append(f"the map {method!r} needs the joint model, so {DEFAULT!r} is shown")
            method = DEFAULT
        if word > last:
            notes.append(f"there is no word {word + 1} in it, so the last one is shown")
        return {
            self._parts.answered: found,
            results.answer: answer_html("Answer", ex.text, "; ".join(notes), number),
            results.words: gr.update(choices=_numbered(ex.tokens), value=token, visible=True, interactive=True),
            results.method: gr.update(choices=offered, value=method, visible=True),
            **await self._maps.new_word(found, token, method),
            **dict.fromkeys([results.check, results.report, results.numbers], gr.update(visible=True)),
        }

    def video(self, file: str | None, wanted: Wanted | None) -> Wanted:
        """Take note of the video that was uploaded, or that it was removed."""
        return replace(wanted or Wanted(), video=file)

    def stop(self, running: threading.Event | None) -> str:
        """End the answer in progress, and return what the page says meanwhile."""
        if running is None:
            return ""
        running.set()
        return told_html("Stopping …")

    async def link(self, file: str | None, *values: Any) -> tuple[str, str]:
        """Return the query of a link to the values of the controls, and what is wrong with them."""
        try:
            sample = file is not None and await self._tool.is_sample(Path(file))
            return query_of(Inputs.checked(_given(values), self._limits), self._limits, sample), ""
        except Exception as error:
            return "", problem(error, self._log)

    def restore(self, found: str) -> Changes:
        """Fill the controls from a link, or from what the browser kept of the last question.

        Args:
            found: JSON of the query of the page's address, of what is stored, and of whether the image is kept.
        """
        controls = self._controls
        query, stored, image = _of_page(found)
        given, sample = of_query(query)
        from_link = bool(given) or sample
        if not from_link:
            given = of_store(stored)
        if not from_link and not given:
            return {controls.notice: ""}
        try:
            asked = Inputs.checked(given, self._limits)
            offered = methods(asked.joint)
            if asked.method not in _names(offered):
                raise InputError(f"the map {asked.method!r} needs the joint model: set joint to 1")
        except InputError as error:
            source = "This link cannot be followed" if from_link else "What this browser kept does not fit this server"
            return {controls.problem: told_html(f"{source}: {error}.")}
        values = [getattr(asked, name) for name in NAMES[: len(controls.values)]]
        values = [list(one) if isinstance(one, tuple) else one for one in values]
        changes = {
            **dict(zip(controls.values, values, strict=True)),
            self._parts.wanted: Wanted(asked.question, asked.word),
            self._results.method: gr.update(choices=offered, value=asked.method),
            controls.notice: told_html(_notice(from_link, sample, image)),
        }
        if sample:
            changes[controls.picture] = sample_image()
        if not from_link:
            changes |= {controls.ask: "Ask again", controls.forget: gr.update(visible=True)}
        return changes


def sample_image() -> Image.Image:
    """Return the sample image."""
    return Image.open(SAMPLE).convert("RGB")


def _given(values: Sequence[Any]) -> dict[str, Any]:
    """Return the values of controls by the names of `Inputs`; what has no value yet is left out."""
    return {name: value for name, value in zip(NAMES, values, strict=False) if value is not None}


def _of_page(found: str) -> tuple[str, str | None, str]:
    """Return the query of the page's address, what the browser kept, and whether it kept the image."""
    try:
        given = json.loads(found)
    except (ValueError, RecursionError):
        given = None
    texts = given if isinstance(given, dict) else {}
    query, stored, image = (texts.get(name) for name in ("query", "stored", "image"))
    return query if isinstance(query, str) else "", stored if isinstance(stored, str) else None, str(image)


def _notice(from_link: bool, sample: bool, image: str) -> str:
    if from_link:
        return "The question of the link is here: " + ("press Ask." if sample else "give its image, and press Ask.")
    back = "Your last question is back"
    if image == "kept":
        return f"{back}: press Ask again."
    why = "it is larger than the 4 MB that a browser keeps" if image == "large" else "only the tab that had it keeps it"
    return f"{back}, but not its image ({why}): give it once more, and press Ask again."


def _names(offered: list[tuple[str, str]]) -> set[str]:
    return {name for _, name in offered}


def _numbered(tokens: list[str]) -> list[tuple[str, int]]:
    return [(token.strip() or "·", i) for i, token in enumerate(tokens)]
