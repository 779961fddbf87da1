"""The browser tool: ask about an image, and see which patches and heads made the model say each word.

It is a Gradio page, mounted on the server. All controls are buttons, sliders or radio buttons, which work with the
keyboard. The colours of a heatmap go from dark to light in even steps, so that it can be read without colour vision.
"""

from __future__ import annotations

import atexit
import html
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # Gradio sends no usage data
os.environ.setdefault("GRADIO_RUN_HISTORY", "False")  # the browser keeps no images of earlier users

import gradio as gr
import numpy as np
from fastapi import FastAPI
from fastapi.responses import RedirectResponse
from PIL import Image
from starlette.routing import Mount

from ..core.assets import SAMPLE
from ..drawing.heatmap import colors
from ..explain.registry import ALIGNMENT, DEFAULT, HEATMAP_METHODS
from .auth import ApiKeys
from .errors import service_error
from .logs import Log
from .ui_backend import ROUTES, Answered, Drawn, Shown, UIBackend
from .ui_sessions import UISessionMiddleware

_BEST = "best"
_EVERY = -1  # the value of the layer slider that stands for the best heads of all layers
_HOUR = 3600  # seconds
_METHODS = {
    "logprob": "increase of the log-probability",
    "attention": "mean attention",
    "rollout": "attention rollout",
    "relevancy": "relevancy (gradient-weighted attention)",
}
_BOXES = {ALIGNMENT: "gradient alignment, with the detector's boxes"}
_CSS = """
.gradio-container { max-width: 1280px !important; margin: auto; }
#map img { width: 100%; image-rendering: auto; }
.ramp { height: 12px; border-radius: 3px; border: 1px solid #888; }
.ends { display: flex; justify-content: space-between; gap: 12px; text-align: center; font-size: 0.85em; }
#tokens label, #heads label { padding: 4px 10px; }
#lens td, #lens th { text-align: left; padding: 1px 14px 1px 0; }
#tokens .wrap, #heads .wrap { gap: 6px; }
:focus-visible { outline: 3px solid #0072b2 !important; outline-offset: 2px; }
.unseen { display: none !important; }
footer { display: none !important; }
"""
_ABOUT = """### Which patches made the model say it?
Ask about an image. Every word comes with the patches that raised its probability; choose a word, a head or a layer to
see its map. Light is high. Click on a patch to read the words that it stands for, layer by layer. Knock attention out,
or keep a few patches only, and see what the model still knows."""

# clicks the download button once the file exists
_CLICK = "() => setTimeout(() => (document.querySelector('#file a') || document.querySelector('#file')).click(), 200)"

Outputs = tuple[Any, ...]


def mount(app: FastAPI, tool: UIBackend, keys: ApiKeys, log: Log, path: str = "/ui") -> FastAPI:
    """Mount the browser tool on the server.

    If the server has API keys, each of them is accepted as the password. Uploaded and generated files are stored in a
    folder of this process, and each browser can read only its own files, see `ui_sessions`.

    Args:
        app: The server's application.
        tool: Runs the model for the tool.
        keys: The API keys that are accepted.
        log: Writes the errors.
        path: Where the tool is mounted.

    Returns:
        The application.
    """
    cache = tempfile.mkdtemp(prefix="mllm-fast-ui-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = (
        cache  # read when components are created; Gradio's default folder is shared by all its programs
    )
    login: Callable[[str, str], bool] | None = None
    if keys:
        login = lambda _, password: keys.tenant(password) is not None  # noqa: E731
    for place in ("/", path):
        app.add_api_route(place, lambda: RedirectResponse(f"{path}/"), include_in_schema=False)
    blocks = build(tool, log)
    gr.mount_gradio_app(
        app,
        blocks,
        path=path,
        auth=login,
        auth_message="Any name; the password is an API key." if login else None,
        max_file_size=tool.service.settings.max_body,
        show_error=True,
        ssr_mode=False,
        theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=_CSS,
    )
    blocks.has_launched = True  # mounting leaves this unset, and Gradio would then not check file paths
    mounted = next(route for route in app.routes if isinstance(route, Mount) and route.path == path)
    gradio_app: Any = mounted.app

    def logged_in(cookies: Mapping[str, str]) -> bool:
        names = (f"access-token-{gradio_app.cookie_id}", f"access-token-unsecure-{gradio_app.cookie_id}")
        return login is None or any(cookies.get(name) in gradio_app.tokens for name in names)

    mounted.app = UISessionMiddleware(gradio_app, _HOUR, tool.service.settings.max_pixels, logged_in)
    return app


def build(tool: UIBackend, log: Log) -> gr.Blocks:  # noqa: PLR0915  # long: one page, from top to bottom
    """Build the page of the tool."""
    page = Page(tool, log)
    last = tool.num_layers - 1
    with gr.Blocks(title="mllm-fast", analytics_enabled=False, delete_cache=(_HOUR, _HOUR)) as blocks:
        answered = gr.State(None, time_to_live=_HOUR)
        gr.Markdown(_ABOUT)
        with gr.Row():
            with gr.Column(min_width=300):
                picture = gr.Image(
                    type="filepath",  # the file as it came: Gradio decodes nothing of it
                    format="png",  # lossless, for the sample image too
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    label="Image",
                    height=320,
                    elem_id="image",
                )
                question = gr.Textbox(label="Question", value="Describe the image.", max_lines=4, elem_id="question")
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", elem_id="ask")
                    sample = gr.Button("Sample image", elem_id="sample")
                with gr.Accordion("Knock attention out", open=False, elem_id="knockout"):
                    routes = gr.CheckboxGroup(list(ROUTES), label="What may not be looked at", elem_id="routes")
                    first = gr.Slider(0, last, 0, step=1, label="From layer", elem_id="first-layer")
                    to = gr.Slider(0, last, last, step=1, label="To layer", elem_id="last-layer")
                with gr.Accordion("Keep a few patches", open=False, elem_id="compression"):
                    keep = gr.Slider(
                        0, 100, 0, step=1, label="Image tokens kept a layer, % (0: not asked)", elem_id="keep"
                    )
                joint = gr.Checkbox(
                    False,
                    label="Answer through the joint model, with a detector's boxes",
                    visible=tool.joint is not None,
                    elem_id="joint",
                )
            with gr.Column(min_width=300):
                with gr.Row():
                    answer = gr.Textbox(label="Answer", interactive=False, lines=2, elem_id="answer")
                    other = gr.Textbox(
                        label="With attention knocked out", interactive=False, lines=2, visible=False, elem_id="other"
                    )
                    small = gr.Textbox(
                        label="From the kept patches", interactive=False, lines=2, visible=False, elem_id="small"
                    )
                tokens = gr.Radio([], label="Words", visible=False, elem_id="tokens")
                shown = gr.Image(
                    label="Map",
                    show_label=False,
                    alt_text="The image with the map of a word over it",
                    interactive=False,
                    format="png",
                    buttons=["download", "fullscreen"],
                    elem_id="map",
                )
                meaning = gr.HTML(elem_id="meaning")
                lens = gr.HTML(elem_id="lens")
                methods = _methods()
                method = gr.Dropdown(methods, value=DEFAULT, label="Map", visible=False, elem_id="method")
                layer = gr.Slider(
                    _EVERY,
                    last,
                    _EVERY,
                    step=1,
                    label="Layer (-1: the best heads of all)",
                    visible=False,
                    elem_id="layer",
                )
                heads = gr.Radio(
                    [], label="Heads that raised it most, and words they write", visible=False, elem_id="heads"
                )
                with gr.Row():
                    check = gr.Button("Check this map", visible=False, elem_id="check")
                    report = gr.Button("Report (.html)", visible=False, elem_id="report")
                    numbers = gr.Button("Numbers (.json)", visible=False, elem_id="numbers")
                    file = gr.DownloadButton("File", elem_id="file", elem_classes="unseen")
                verdict = gr.Markdown(elem_id="verdict")
                kept = gr.Image(
                    label="Kept patches",
                    show_label=False,
                    alt_text="The patches that each layer keeps",
                    interactive=False,
                    format="png",
                    buttons=["download", "fullscreen"],
                    visible=False,
                    elem_id="kept",
                )
        chosen = [answered, tokens, layer, heads, method]
        seen = [shown, meaning, verdict]  # a verdict belongs to the map that was shown
        results = [
            answered,
            answer,
            other,
            small,
            tokens,
            heads,
            layer,
            method,
            *seen,
            kept,
            check,
            report,
            numbers,
        ]
        given = [picture, question, routes, first, to, keep, joint]
        going: dict[str, Any] = {"concurrency_limit": 16, "trigger_mode": "once"}
        ask.click(page.ask, given, results, **going)
        question.submit(page.ask, given, results, **going)
        sample.click(lambda: (Image.open(SAMPLE).convert("RGB"), "What color is the star?"), None, [picture, question])
        tokens.input(page.token, [answered, tokens, method], [heads, layer, *seen], **_live())
        heads.input(page.head, chosen, [layer, *seen], **_live())
        layer.release(page.layer, chosen, [heads, *seen], **_live())
        method.input(page.method, chosen, seen, **_live())
        shown.select(page.patch, answered, lens, **_live())
        for asked in (ask.click, question.submit):
            asked(lambda: "", None, lens)
        check.click(page.check, chosen, verdict, **going)
        for button, make in ((report, page.report), (numbers, page.numbers)):
            made = button.click(make, [answered, method], file, **going)
            made.success(None, None, None, js=_CLICK)
    return blocks


def _live() -> dict[str, Any]:
    return {"concurrency_limit": 16, "trigger_mode": "always_last", "show_progress": "minimal"}


class Page:
    """The event handlers of the page.

    Args:
        tool: Runs the model.
        log: Writes the errors.
    """

    def __init__(self, tool: UIBackend, log: Log):
        self._tool, self._log = tool, log
        self._files = tempfile.TemporaryDirectory(prefix="mllm-fast-")

    async def ask(
        self, file: str | None, question: str, routes: list[str], first: int, to: int, keep: float, joint: bool
    ) -> AsyncIterator[Outputs]:
        """Answer the question: normally, with attention knocked out, and from a context, as far as requested."""
        if file is None:
            raise _error("Give an image first: upload one, paste one, or take the sample.")
        if not (question or "").strip():
            raise _error("Ask something about the image.")
        tool, hide = self._tool, gr.update(visible=False)
        found: Answered | None = None
        nothing: Outputs = (None, "", hide, hide, hide, hide, hide, hide, None, "", "", hide, hide, hide, hide)
        yield nothing
        skip = gr.skip()
        try:
            picture = await tool.picture(Path(file))
            async for heard in tool.answer(picture, question, joint):
                found = heard.done
                words = gr.update(choices=_numbered(heard.tokens), value=len(heard.tokens) - 1, visible=True)
                if found is None:
                    yield (skip, heard.text, *[skip] * 2, words, *[skip] * 3, heard.map, *[skip] * 6)
            assert found is not None
            token = len(found.explanation.tokens) - 1
            heads = await self._heads(found, token)
            seen = await self._map(found, token, _EVERY, _BEST, DEFAULT)
            methods = _methods(joint)
            yield (
                found,
                found.explanation.text,
                *[skip] * 2,
                gr.update(choices=_numbered(found.explanation.tokens), value=token, visible=True),
                heads,
                gr.update(value=_EVERY, visible=True),
                gr.update(choices=methods, value=DEFAULT, visible=True),
                *seen,
                skip,
                *[gr.update(visible=True)] * 3,
            )
            if routes:
                async for text in tool.impaired(picture, question, routes, int(first), int(to), joint):
                    yield (*[skip] * 2, gr.update(value=text, visible=True), *[skip] * 12)
            if keep:
                text, facts, patches = await tool.compressed(picture, question, keep)
                shown = gr.update(value=text, info=facts, visible=True)
                yield (*[skip] * 3, shown, *[skip] * 7, gr.update(value=patches, visible=True), *[skip] * 3)
        except Exception as error:
            raise self._told(error) from None

    async def token(self, answered: Answered | None, token: int, method: str) -> Outputs:
        """Show the map and the best heads of another word."""
        held = _held(answered)
        try:
            heads = await self._heads(held, token)
        except Exception as error:
            raise self._told(error) from None
        return (heads, gr.update(value=_EVERY), *await self._map(held, token, _EVERY, _BEST, method))

    async def head(self, answered: Answered | None, token: int, layer: int, head: str, method: str) -> Outputs:
        """Show the map of one head."""
        return (gr.update(value=_EVERY), *await self._map(answered, token, _EVERY, head, method))

    async def layer(self, answered: Answered | None, token: int, layer: int, head: str, method: str) -> Outputs:
        """Show the map of all heads of a layer."""
        return (gr.update(value=_BEST), *await self._map(answered, token, layer, _BEST, method))

    async def method(self, answered: Answered | None, token: int, layer: int, head: str, method: str) -> Outputs:
        """Show the map of the same word by another method."""
        return await self._map(answered, token, layer, head, method)

    async def patch(self, answered: Answered | None, at: gr.SelectData) -> str:
        """Show the words of the patch that was clicked on, layer by layer."""
        try:
            x, y = at.index
            found = await self._tool.patch(_held(answered), (int(x), int(y)))
        except Exception as error:
            raise self._told(error) from None
        lines = "".join(
            f"<tr><td>{html.escape(layer)}</td><td>{html.escape(', '.join(words))}</td></tr>" for layer, words in found
        )
        return (
            "<p>What this patch stands for before each layer:</p>"
            f"<table><thead><tr><th>layer</th><th>nearest words</th></tr></thead><tbody>{lines}</tbody></table>"
        )

    async def check(self, answered: Answered | None, token: int, layer: int, head: str, method: str) -> Any:
        """Check whether the word depends on the patches that the map shows. Drop the result if the map changed."""
        try:
            words = await self._tool.verified(_held(answered), _shown(token, layer, head, method))
        except Exception as error:
            raise self._told(error) from None
        return gr.skip() if words is None else f"**{words}**"

    async def report(self, answered: Answered | None, method: str) -> str:
        """Return the path of the explanation as an HTML file."""
        return await self._file(answered, "html", method)

    async def numbers(self, answered: Answered | None, method: str) -> str:
        """Return the path of the explanation as a JSON file."""
        return await self._file(answered, "json", method)

    def _told(self, error: Exception) -> gr.Error:
        """Return the error to show to the user, and log where the server itself failed."""
        if isinstance(error, gr.Error):
            return error
        found = service_error(error)
        if found.where:
            self._log("error", route="ui", error=found.where)
        return _error(found.message)

    async def _file(self, answered: Answered | None, kind: str, method: str) -> str:
        try:
            content = await self._tool.report(_held(answered), kind, method)
        except Exception as error:
            raise self._told(error) from None
        for old in Path(self._files.name).iterdir():  # Gradio has its own copies and removes them after an hour
            shutil.rmtree(old, ignore_errors=True)
        path = Path(tempfile.mkdtemp(dir=self._files.name)) / f"explanation.{kind}"
        path.write_bytes(content)
        return str(path)

    async def _heads(self, answered: Answered, token: int) -> Any:
        found = await self._tool.heads(answered, token)
        entries = [("the ten best together", _BEST)]
        entries += [
            (f"layer {layer}, head {head}: {score:+.2f}  ({words})", f"{layer}.{head}")
            for layer, head, score, words in found
        ]
        return gr.update(choices=entries, value=_BEST, visible=True)

    async def _map(
        self, answered: Answered | None, token: int, layer: int, head: str, method: str
    ) -> tuple[Image.Image, str, str]:
        """Return the map, its legend, and an empty verdict."""
        try:
            drawn = await self._tool.map(_held(answered), _shown(token, layer, head, method))
        except Exception as error:
            raise self._told(error) from None
        return drawn.image, _legend(drawn), ""


def _shown(token: int, layer: int, head: str, method: str) -> Shown:
    one = None if head == _BEST else (int(head.partition(".")[0]), int(head.partition(".")[2]))
    return Shown(token, one, None if layer == _EVERY else int(layer), method)


def _legend(drawn: Drawn) -> str:
    """Return the legend of a map as HTML: its colours, their meaning, and the largest value."""
    steps = ", ".join(
        f"rgb({','.join(str(round(one)) for one in colors(np.array(share)))})" for share in np.linspace(0, 1, 9)
    )
    return (
        f'<div class="ramp" role="img" aria-label="colours from dark, 0, to light, {drawn.top:.3g}"'
        f' style="background:linear-gradient(to right, {steps})"></div>'
        f'<div class="ends"><span>0</span><span>{html.escape(drawn.meaning)}</span><span>{drawn.top:.3g}</span></div>'
    )


def _numbered(tokens: list[str]) -> list[tuple[str, int]]:
    return [(token.strip() or "·", i) for i, token in enumerate(tokens)]


def _held(answered: Answered | None) -> Answered:
    if answered is None:
        raise _error("The answer was forgotten after an hour: ask again.")
    return answered


def _error(message: str) -> gr.Error:
    return gr.Error(message, duration=10, print_exception=False)


def _methods(joint: bool = False) -> list[tuple[str, str]]:
    """Return the heatmap methods to choose from as (description, name): some built-in ones, and all from plugins."""
    added = [HEATMAP_METHODS.get(name) for name in HEATMAP_METHODS.added()]
    offered = _METHODS | (_BOXES if joint else {})
    offered |= {one.name: f"{one.name} ({one.meaning})" for one in added if joint or not one.needs_detector}
    return [(words, name) for name, words in offered.items()]
