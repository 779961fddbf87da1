"""The browser tool: ask about an image, and see which patches and heads made the model say each word.

It is a Gradio page, mounted on the server. All controls are buttons, sliders or radio buttons, which work with the
keyboard. The colours of a heatmap go from dark to light in even steps, so that it can be read without colour vision.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # Gradio sends no usage data
os.environ.setdefault("GRADIO_RUN_HISTORY", "False")  # the browser keeps no images of earlier users

import gradio as gr
from fastapi import FastAPI
from fastapi.responses import RedirectResponse
from PIL import Image
from starlette.routing import Mount

from .auth import ApiKeys
from .logs import Log
from .ui_backend import UIBackend
from .ui_inputs import NAMES
from .ui_map import MapPage
from .ui_page import Page, sample_image
from .ui_parts import EXAMPLES, HOUR, Parts, methods, page_parts
from .ui_sessions import UISessionMiddleware

# what an event that runs the model may do, and one that follows the user's choices
_GOING: dict[str, Any] = {"concurrency_limit": 16, "trigger_mode": "once", "show_progress": "hidden"}
_LIVE: dict[str, Any] = {"concurrency_limit": 16, "trigger_mode": "always_last", "show_progress": "minimal"}
_SCRIPT, _STYLE = (Path(__file__).with_name(name) for name in ("ui.js", "ui.css"))


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
        theme=_theme(),
        css=_STYLE.read_text(),
        head=f"<script>{_SCRIPT.read_text()}</script>",
    )
    blocks.has_launched = True  # mounting leaves this unset, and Gradio would then not check file paths
    mounted = next(route for route in app.routes if isinstance(route, Mount) and route.path == path)
    gradio_app: Any = mounted.app

    def logged_in(cookies: Mapping[str, str]) -> bool:
        names = (f"access-token-{gradio_app.cookie_id}", f"access-token-unsecure-{gradio_app.cookie_id}")
        return login is None or any(cookies.get(name) in gradio_app.tokens for name in names)

    mounted.app = UISessionMiddleware(gradio_app, HOUR, tool.service.settings.max_pixels, logged_in)
    return app


def _theme() -> gr.themes.Base:
    """Return Gradio's theme Soft with no fonts of the network, and with more contrast where it has little."""
    made = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return made.set(
        background_fill_primary="*neutral_50",  # Soft's own, which `set` forgets
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*primary_800",
        block_title_text_color="*primary_800",
        checkbox_border_color="*neutral_500",
        checkbox_border_color_dark="*neutral_400",
        input_border_color="*neutral_400",
        input_border_color_dark="*neutral_500",
        input_border_width="1px",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
    )


def build(tool: UIBackend, log: Log) -> gr.Blocks:
    """Build the page of the tool."""
    limits = tool.limits(name for _, name in methods(tool.joint is not None))
    with gr.Blocks(title="mllm-fast", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as blocks:
        parts = page_parts(tool, limits)
        maps = MapPage(tool, parts, log)
        page = Page(tool, parts, maps, limits, log)
        _wire_controls(parts, page)
        _wire_results(parts, maps)
        found = gr.Textbox(visible=False)  # its value is what ui.js finds in the browser
        filled = [*parts.controls.values, parts.wanted, parts.results.method, parts.controls.notice]
        filled += [parts.controls.problem, parts.controls.picture, parts.controls.ask, parts.controls.forget]
        loaded = blocks.load(page.restore, found, filled, js="() => mllm.found()", show_progress="hidden")
        loaded.then(None, None, None, js="() => mllm.back()")
    return blocks


def _wire_controls(parts: Parts, page: Page) -> None:
    controls, results = parts.controls, parts.results
    shown = [results.answer, results.other, results.small, results.words, results.trouble, results.map, results.moment]
    shown += [results.meaning, results.lens, results.method, results.layer, results.heads, results.check]
    shown += [results.report, results.numbers, results.verdict, results.kept]
    told = [controls.status, controls.problem, controls.notice, controls.forget, controls.ask, controls.stop]
    asking = [controls.ask.click, controls.question.submit]
    names = json.dumps(NAMES[: len(controls.values)])
    gr.on(asking, None, [controls.picture, *controls.values], None, js=f"(...given) => mllm.asked({names}, ...given)")
    gr.on(
        asking,
        page.ask,
        [controls.picture, parts.wanted, *controls.values, results.method],
        [parts.answered, parts.running, parts.wanted, *told, *shown],
        **_GOING | {"trigger_mode": "always_last"},  # a click while an answer ends is not lost
    )
    controls.video.change(page.video, [controls.video, parts.wanted], parts.wanted, **_LIVE)
    controls.stop.click(page.stop, parts.running, controls.status, js="(one) => mllm.stopped(one)", **_LIVE)
    for button, question in zip(controls.examples, EXAMPLES, strict=True):
        shown_there = [controls.picture, controls.video, controls.question]
        button.click(partial(_example, question), None, shown_there, show_progress="hidden")
    controls.forget.click(None, None, None, js="() => mllm.forget()")
    query = gr.Textbox(visible=False)
    given = [controls.picture, *controls.values, results.method, results.words]
    linked = controls.share.click(page.link, given, [query, controls.problem], **_LIVE)
    linked.success(None, query, controls.link, js="(query) => mllm.copy(query)")


def _example(question: str) -> tuple[Image.Image, None, str]:
    return sample_image(), None, question


def _wire_results(parts: Parts, page: MapPage) -> None:
    results = parts.results
    chosen = [parts.answered, results.words, results.layer, results.heads, results.method]
    word = [parts.answered, results.words, results.method]
    seen = [
        results.trouble,
        results.map,
        results.moment,
        results.meaning,
        results.verdict,
    ]  # a verdict belongs to the map shown
    results.words.input(page.word, word, [results.heads, results.layer, *seen], **_LIVE)
    results.heads.input(page.head, chosen, [results.layer, *seen], **_LIVE)
    results.layer.release(page.layer, chosen, [results.heads, *seen], **_LIVE)
    results.moment.release(page.moment, [*chosen, results.moment], seen, **_LIVE)
    results.method.input(page.method, word, [results.heads, results.layer, *seen], **_LIVE)
    gr.on(
        [results.words.input, results.method.input],
        None,
        [results.words, results.method],
        None,
        js='(...given) => mllm.chosen(["word", "method"], ...given)',
    )
    results.map.select(page.patch, parts.answered, [results.trouble, results.lens], **_LIVE)
    results.check.click(page.check, chosen, [results.trouble, results.verdict], **_GOING)
    for button, make in ((results.report, page.report), (results.numbers, page.numbers)):
        made = button.click(make, [parts.answered, results.method], [results.trouble, results.file], **_GOING)
        made.success(None, None, None, js="() => mllm.download()")
