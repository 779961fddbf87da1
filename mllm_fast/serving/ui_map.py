"""The event handlers of the right column of the browser tool's page: words, heads, layers, patches, checks, files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from ..explain.registry import HEATMAP_METHODS
from .errors import ServiceError, service_error
from .logs import Log
from .ui_backend import Answered, Shown, UIBackend
from .ui_parts import BEST, EVERY, Parts
from .ui_text import legend_html, patch_html, told_html

Changes = dict[Any, Any]


class MapPage:
    """The event handlers.

    Args:
        tool: Runs the model.
        parts: The components of the page.
        log: Writes the errors.
    """

    def __init__(self, tool: UIBackend, parts: Parts, log: Log):
        self._tool, self._results, self._log = tool, parts.results, log
        self._files = tempfile.TemporaryDirectory(prefix="mllm-fast-")

    async def word(self, answered: Answered | None, token: int, method: str) -> Changes:
        """Show the map and the best heads of another word."""
        return await self._told(lambda: self.new_word(_held(answered), token, method))

    async def head(self, answered: Answered | None, token: int, layer: int, head: str, method: str) -> Changes:
        """Show the map of one head."""
        return {self._results.layer: EVERY, **await self._map(answered, token, EVERY, head, method)}

    async def layer(self, answered: Answered | None, token: int, layer: int, head: str, method: str) -> Changes:
        """Show the map of all heads of a layer."""
        if _stays(answered, _shown(token, layer, head, method)):
            return {self._results.trouble: ""}
        return {self._results.heads: BEST, **await self._map(answered, token, layer, BEST, method)}

    async def moment(self, answered: Answered | None, *values: Any) -> Changes:
        """Show the same map at another moment of the video; the values are those of `check`, and the moment."""
        *chosen, moment = values
        shown = replace(_shown(*chosen), moment=int(moment))
        if answered is not None and moment == answered.moment and _stays(answered, shown):
            return {self._results.trouble: ""}
        return await self._told(lambda: self._drawn(_held(answered), shown))

    async def method(self, answered: Answered | None, token: int, method: str) -> Changes:
        """Show the map of the same word by another method, of the best heads if it takes heads."""
        results, chosen = self._results, _takes(method)
        return {
            results.heads: gr.update(value=BEST, **chosen),
            results.layer: gr.update(value=EVERY, **chosen),
            **await self._map(answered, token, EVERY, BEST, method),
        }

    async def patch(self, answered: Answered | None, at: gr.SelectData) -> Changes:
        """Show the words of the patch that was clicked on, layer by layer."""

        async def found() -> Changes:
            x, y = at.index
            return {self._results.lens: patch_html(await self._tool.patch(_held(answered), (int(x), int(y))))}

        return await self._told(found)

    async def check(self, answered: Answered | None, token: int, layer: int, head: str, method: str) -> Changes:
        """Check whether the word depends on the patches that the map shows. Drop the result if the map changed."""

        async def found() -> Changes:
            words = await self._tool.verified(_held(answered), _shown(token, layer, head, method))
            return {} if words is None else {self._results.verdict: f"**{words}**"}

        return await self._told(found)

    async def report(self, answered: Answered | None, method: str) -> Changes:
        """Return the explanation as an HTML file."""
        return await self._told(lambda: self._file(answered, "html", method))

    async def numbers(self, answered: Answered | None, method: str) -> Changes:
        """Return the explanation as a JSON file."""
        return await self._told(lambda: self._file(answered, "json", method))

    async def _told(self, do: Callable[[], Awaitable[Changes]]) -> Changes:
        """Return the changes that `do` makes, or words about what went wrong above the map."""
        try:
            return {self._results.trouble: "", **await do()}
        except Exception as error:
            return {self._results.trouble: problem(error, self._log)}

    async def _file(self, answered: Answered | None, kind: str, method: str) -> Changes:
        content = await self._tool.report(_held(answered), kind, method)
        for old in Path(self._files.name).iterdir():  # Gradio has its own copies and removes them after an hour
            shutil.rmtree(old, ignore_errors=True)
        path = Path(tempfile.mkdtemp(dir=self._files.name)) / f"explanation.{kind}"
        path.write_bytes(content)
        return {self._results.file: str(path)}

    async def new_word(self, answered: Answered, token: int, method: str) -> Changes:
        """Return the map and the best heads of a word."""
        results, chosen = self._results, _takes(method)
        entries = [("the ten best together", BEST)]
        entries += [
            (f"layer {layer}, head {head}: {score:+.2f}  ({words})", f"{layer}.{head}")
            for layer, head, score, words in await self._tool.heads(answered, token)
        ]
        return {
            results.heads: gr.update(choices=entries, value=BEST, visible=True, **chosen),
            results.layer: gr.update(value=EVERY, visible=True, **chosen),
            **await self._drawn(answered, Shown(token, method=method)),
        }

    async def _map(self, answered: Answered | None, token: int, layer: int, head: str, method: str) -> Changes:
        return await self._told(lambda: self._drawn(_held(answered), _shown(token, layer, head, method)))

    async def _drawn(self, answered: Answered, shown: Shown) -> Changes:
        """Return the map and its legend, without the verdict on another map."""
        drawn = await self._tool.map(answered, shown)
        results = self._results
        return {
            results.map: gr.update(value=drawn.image, visible=True),
            results.moment: _moments(answered, drawn.moment),
            results.meaning: legend_html(drawn.meaning, drawn.top),
            results.verdict: "",
        }


def problem(error: Exception, log: Log) -> str:
    """Return what the page says of an error, and log where the server itself failed."""
    found = service_error(error)
    if found.where:
        log("error", route="ui", error=found.where)
    return told_html(found.message)


def _moments(answered: Answered, moment: int) -> Any:
    """Return the slider of a video's moments, at the one that is shown; it is hidden for one image."""
    last = len(answered.explanation.images) - 1
    if last == 0:
        return gr.update(visible="hidden")
    return gr.update(minimum=0, maximum=last, value=moment, visible=True)


def _takes(method: str) -> dict[str, Any]:
    """Return whether layers and heads can be chosen for a method, as properties of their components."""
    takes = HEATMAP_METHODS.get(method).takes_heads
    return {"interactive": takes, "info": "" if takes else f"{method} has one map for all heads and layers"}


def _shown(token: int, layer: int, head: str, method: str) -> Shown:
    one = None if head == BEST else (int(head.partition(".")[0]), int(head.partition(".")[2]))
    return Shown(token, one, None if layer == EVERY else int(layer), method)


def _stays(answered: Answered | None, shown: Shown) -> bool:
    """Return whether that map is shown, at any moment: a slider also reports that the keyboard leaves its number."""
    shown_now = answered.shown if answered is not None else None
    return shown_now is not None and replace(shown_now, moment=shown.moment) == shown


def _held(answered: Answered | None) -> Answered:
    if answered is None:
        raise ServiceError(404, "There is no whole answer here yet, or it was forgotten after an hour: ask again.")
    return answered
