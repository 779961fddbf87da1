"""The components of the browser tool's page, from top to bottom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..core.video import VIDEO_ENDINGS
from ..explain.registry import ALIGNMENT, DEFAULT, HEATMAP_METHODS
from .ui_backend import UIBackend
from .ui_inputs import HOTTEST, LEAST_P, ROUTES, Inputs, Limits
from .ui_text import HINT, answer_html, model_html

HOUR = 3600  # seconds
BEST = "best"  # the value of the heads that stands for the best ones together
EVERY = -1  # the value of the layer slider that stands for the best heads of all layers
EXAMPLES = ("What color is the star?", "Describe the image.", "Is there a ring?")
_METHODS = {
    "logprob": "increase of the log-probability",
    "attention": "mean attention",
    "rollout": "attention rollout",
    "relevancy": "relevancy (gradient-weighted attention)",
}
_BOXES = {ALIGNMENT: "gradient alignment, with the detector's boxes"}
_ABOUT = """### Which patches made the model say it?
Ask about an image, or a video. Every word comes with the patches that raised its probability; choose a word, a head or
a layer to see its map. Light is high. Click on a patch to read the words that it stands for, layer by layer. Knock
attention out, or keep a few patches only, and see what the model still knows."""


def methods(joint: bool = False) -> list[tuple[str, str]]:
    """Return the heatmap methods to choose from as (description, name): some built-in ones, and all from plugins."""
    added = [HEATMAP_METHODS.get(name) for name in HEATMAP_METHODS.added()]
    offered = _METHODS | (_BOXES if joint else {})
    offered |= {one.name: f"{one.name} ({one.meaning})" for one in added if joint or not one.needs_detector}
    return [(words, name) for name, words in offered.items()]


@dataclass(frozen=True)
class Controls:
    """What is given to a question; the fields from `question` to `top_p` have the order of `Inputs`."""

    notice: Any
    forget: Any
    picture: Any
    video: Any
    examples: tuple[Any, ...]
    ask: Any
    stop: Any
    status: Any
    problem: Any
    question: Any
    knockout: Any
    first: Any
    last: Any
    keep: Any
    joint: Any
    tokens: Any
    temperature: Any
    top_p: Any
    share: Any
    link: Any

    @property
    def values(self) -> list[Any]:
        """The components of `Inputs`, as far as they stand here."""
        asked = [self.question, self.knockout, self.first, self.last, self.keep, self.joint]
        return [*asked, self.tokens, self.temperature, self.top_p]


@dataclass(frozen=True)
class Results:
    """What is shown of an answer."""

    answer: Any
    other: Any
    small: Any
    words: Any
    trouble: Any
    map: Any
    moment: Any
    meaning: Any
    lens: Any
    method: Any
    layer: Any
    heads: Any
    check: Any
    report: Any
    numbers: Any
    file: Any
    verdict: Any
    kept: Any


@dataclass(frozen=True)
class Parts:
    """All components of the page.

    Attributes:
        answered: The state that holds the answer.
        running: The state that holds what stops the answer in progress.
        wanted: The state that holds a `Wanted`: what a link or the browser's store names, and the video.
        controls: The left column.
        results: The right column.
    """

    answered: Any
    running: Any
    wanted: Any
    controls: Controls
    results: Results


def page_parts(tool: UIBackend, limits: Limits) -> Parts:
    """Create the components, inside a `gr.Blocks`."""
    answered, running, wanted = (gr.State(None, time_to_live=HOUR) for _ in range(3))
    gr.Markdown(_ABOUT)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            controls = _controls(tool, limits)
        with gr.Column(scale=3, min_width=300):
            results = _results(limits.layers - 1)
    return Parts(answered, running, wanted, controls, results)


def _controls(tool: UIBackend, limits: Limits) -> Controls:  # long: the controls from top to bottom
    usual, last = Inputs.usual(limits), limits.layers - 1
    about = model_html(tool.service.name, limits.layers, tool.vlm.text.num_heads, tool.embedded)
    gr.HTML(about, elem_id="model", elem_classes="told")
    notice = gr.HTML("", elem_id="notice", elem_classes="told")
    forget = gr.Button("Forget it", size="sm", visible="hidden", elem_id="forget")
    picture = gr.Image(
        type="filepath",  # the file as it came: Gradio decodes nothing of it
        format="png",  # lossless, for the sample image too
        image_mode=None,
        sources=["upload", "clipboard"],
        label="Image",
        height=320,
        elem_id="image",
    )
    video = gr.File(
        type="filepath",
        file_types=[*VIDEO_ENDINGS, ".gif", ".webp"],
        label="Or a video",
        height=110,
        elem_id="video",
    )
    gr.HTML('<p id="try">Or try the sample image:</p>', elem_classes="told")
    with gr.Row(elem_id="examples"):
        examples = tuple(
            gr.Button(words, size="sm", min_width=90, elem_id="sample" if i == 0 else f"sample-{i}")
            for i, words in enumerate(EXAMPLES)
        )
    question = gr.Textbox(label="Question", value=usual.question, max_lines=4, elem_id="question")
    with gr.Row():
        ask = gr.Button("Ask", variant="primary", elem_id="ask")
        stop = gr.Button("Stop", variant="stop", visible="hidden", elem_id="stop")
    status, problem = (
        gr.HTML("", elem_id="status", elem_classes="told"),
        gr.HTML("", elem_id="problem", elem_classes="told"),
    )
    with gr.Accordion("Answer", open=False, elem_id="answering"):
        tokens = gr.Slider(1, limits.tokens, usual.tokens, step=1, label="Longest answer, tokens", elem_id="longest")
        temperature = gr.Slider(
            0, HOTTEST, usual.temperature, step=0.05, label="Temperature (0: the likeliest words)", elem_id="heat"
        )
        top_p = gr.Slider(LEAST_P, 1, usual.top_p, step=0.05, label="Top-p, above temperature 0", elem_id="top-p")
    with gr.Accordion("Knock attention out", open=False, elem_id="knockout"):
        knockout = gr.CheckboxGroup(list(ROUTES), label="What may not be looked at", elem_id="routes")
        first = gr.Slider(0, last, 0, step=1, label="From layer", elem_id="first-layer")
        to = gr.Slider(0, last, last, step=1, label="To layer", elem_id="last-layer")
    with gr.Accordion("Keep a few patches", open=False, elem_id="compression"):
        keep = gr.Slider(0, 100, 0, step=1, label="Image tokens kept a layer, % (0: not asked)", elem_id="keep")
    joint = gr.Checkbox(
        False,
        label="Answer through the joint model, with a detector's boxes",
        visible=limits.joint,
        elem_id="joint",
    )
    share = gr.Button("Copy link", size="sm", elem_id="share")
    link = gr.Textbox(
        label="Link to this question, without its image unless that is the sample",
        interactive=False,
        visible="hidden",
        elem_id="link",
    )
    return Controls(
        notice, forget, picture, video, examples, ask, stop, status, problem,
        question, knockout, first, to, keep, joint, tokens, temperature, top_p, share, link,
    )  # fmt: skip


def _results(last: int) -> Results:
    with gr.Row():
        shown: dict[str, Any] = {"elem_classes": "answer", "min_width": 200}
        answer = gr.HTML(answer_html("Answer", HINT), elem_id="answer", **shown)
        other = gr.HTML(visible="hidden", elem_id="other", **shown)
        small = gr.HTML(visible="hidden", elem_id="small", **shown)
    words = gr.Radio([], label="Words", visible="hidden", elem_id="tokens")
    trouble = gr.HTML("", elem_id="map-problem", elem_classes="told")
    seen = gr.Image(
        label="Map",
        show_label=False,
        alt_text="The image with the map of a word over it",
        interactive=False,
        format="png",
        buttons=["download", "fullscreen"],
        visible="hidden",
        elem_id="map",
    )
    moment = gr.Slider(0, 1, 0, step=1, label="Moment of the video", visible="hidden", elem_id="moment")
    meaning, lens = (
        gr.HTML("", elem_id="meaning", elem_classes="told"),
        gr.HTML("", elem_id="lens", elem_classes="told"),
    )
    method = gr.Dropdown(methods(), value=DEFAULT, label="Map", visible="hidden", elem_id="method")
    layer = gr.Slider(
        EVERY, last, EVERY, step=1, label="Layer (-1: the best heads of all)", visible="hidden", elem_id="layer"
    )
    heads = gr.Radio([], label="Heads that raised it most, and words they write", visible="hidden", elem_id="heads")
    with gr.Row():
        check = gr.Button("Check this map", visible="hidden", elem_id="check")
        report = gr.Button("Report (.html)", visible="hidden", elem_id="report")
        numbers = gr.Button("Numbers (.json)", visible="hidden", elem_id="numbers")
        file = gr.DownloadButton("File", elem_id="file", elem_classes="unseen")
    verdict = gr.Markdown(elem_id="verdict")
    kept = gr.Image(
        label="Kept patches",
        show_label=False,
        alt_text="The patches that each layer keeps",
        interactive=False,
        format="png",
        buttons=["download", "fullscreen"],
        visible="hidden",
        elem_id="kept",
    )
    return Results(
        answer, other, small, words, trouble, seen, moment, meaning, lens,
        method, layer, heads, check, report, numbers, file, verdict, kept,
    )  # fmt: skip
