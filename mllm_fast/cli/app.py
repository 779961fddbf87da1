"""The command line: `mllm-fast explain | generate | knockout | compress | ask | kept | serve | eval | coco | joint |
detect | convert | info | tune`.

Only the result is written to stdout; progress and errors go to stderr. Invalid input ends the command with a one-line
message and exit code 2.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from .. import __version__
from ..core.assets import EMBEDDED
from ..core.errors import InputError
from ..core.images import MAX_PIXELS
from ..core.plugins import load_plugins
from ..core.video import MAX_FRAMES
from ..explain.registry import ALIGNMENT, DEFAULT, HEATMAP_METHODS
from . import coco, context, convert, detect, evaluate, joint, machine, serve
from .config import defaults
from .explained import print_explanation, print_sinks
from .options import (
    OUT,
    AsImages,
    Backend,
    Block,
    Device,
    Dtype,
    Fps,
    Frames,
    Images,
    Json,
    Layers,
    MaxFrames,
    MaxPixels,
    Model,
    NewTokens,
    Prefix,
    Question,
    Raw,
    Reading,
    Tp,
    ZeroInputs,
    inputs,
    joint_of,
    load,
    load_joint,
    progress,
    tell_cut,
    tell_embedded,
)
from .shown import Command, Group
from .verbosity import show_log

if TYPE_CHECKING:
    from torch import Tensor

    from ..explain.explanation import Explanation
    from ..knockout.rule import Knockout


_ORDER = (
    "explain",
    "generate",
    "knockout",
    "compress",
    "ask",
    "kept",
    "serve",
    "eval",
    "coco",
    "joint",
    "detect",
    "convert",
    "info",
    "tune",
)


class _Main(Group):
    order = _ORDER  # of use; Typer puts groups of commands last


app = typer.Typer(
    cls=_Main,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Which image patches and attention heads made a vision-language model speak.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mllm-fast {__version__}")
        raise typer.Exit


@app.callback()
def common(
    ctx: typer.Context,
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            envvar="MLLM_FAST_PLUGINS",
            help="A Python file or module that adds heatmap methods, pruning scores, evaluations or architectures;"
            " several.",
        ),
    ] = None,
    verbose: Annotated[
        int,
        typer.Option(
            "--verbose", "-v", count=True, show_default=False, help="Tell on stderr what happens; -vv tells more."
        ),
    ] = 0,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Load the plugins that the options name, and the config file."""
    show_log(verbose)
    load_plugins(plugin or ())  # `main` has loaded them for the help; this is for callers of `app`
    ctx.default_map = defaults(ctx.command)


def explain(  # long: the options of a command are its parameters
    ctx: typer.Context,
    images: Images = None,
    question: Question = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write .png, .html, .json or .safetensors; of a video also .webp or .mp4."),
    ] = None,
    token: Annotated[str | None, typer.Option(help="The word to explain, by its text or its index.")] = None,
    answer: Annotated[str | None, typer.Option(help="Explain this answer in place of the model's own.")] = None,
    prefix: Prefix = None,
    raw: Raw = False,
    final_norm: Annotated[
        str, typer.Option("--final-norm", "--norm", help="The statistics of the final norm: frozen or own.")
    ] = "frozen",
    verify: Annotated[
        bool, typer.Option("--verify", help="Check each word's map of --method by knocking its patches out.")
    ] = False,
    method: Annotated[
        str,
        typer.Option(help=f"How heatmaps are made: {', '.join(HEATMAP_METHODS)}. {ALIGNMENT} needs a joint model."),
    ] = DEFAULT,
    joint: Annotated[
        str | None, typer.Option(help="Read the image by a joint model: a folder, or 'shapes'; its model answers.")
    ] = None,
    lens: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PLACE",
            help='Show the words of a vector: "3" (layer 3\'s input), "3.1" (what head 1 writes), "3.attention",'
            ' "3.mlp", "all" (layer by layer); "@17" behind it for a position, "@120,40" for a pixel. Several.',
        ),
    ] = None,
    words: Annotated[str | None, typer.Option(help="For --lens: words whose rank is shown, with commas.")] = None,
    patch_words: Annotated[
        bool, typer.Option("--patch-words", help="A .html shows the words of each patch, layer by layer, as well.")
    ] = False,
    sinks: Annotated[
        bool,
        typer.Option(
            "--sinks",
            help="Name the attention sinks: positions whose vectors are over 5 times as long as usual. A .png shows the"
            " map without them as well.",
        ),
    ] = False,
    query: Annotated[
        str | None,
        typer.Option(help="For gradient-alignment: what the detector looks for, by default the explained word."),
    ] = None,
    block: Block = None,
    layers: Layers = "all",
    zero_inputs: ZeroInputs = False,
    max_new_tokens: NewTokens = None,
    model: Model = "shapes",
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend = "auto",
    tp: Tp = None,
    fps: Fps = None,
    frames: Frames = None,
    frames_as_images: AsImages = False,
    max_frames: MaxFrames = MAX_FRAMES,
    max_pixels: MaxPixels = MAX_PIXELS,
    as_json: Json = False,
) -> None:
    """Answer a question about an image and show what made the model say each word.

    For each word, a table shows the attention heads that raised its probability most, and the best image patch.
    --out writes the maps to a file.
    --verify checks each map by knocking its patches out.
    """
    from ..core.errors import check_choice
    from ..core.files import check_target
    from ..explain.export import ENDINGS, summary
    from .lens import Lenses

    lenses = Lenses(lens or [], words or "")
    check_choice("--method", method, HEATMAP_METHODS.names())
    joint = joint_of(ctx, joint, model)
    if joint is None and (method == ALIGNMENT or query is not None):
        joint = _aligned(model)
    if out is not None:
        check_target(out, ENDINGS)
    if patch_words and (out is None or out.suffix.lower() != ".html"):
        raise InputError("--patch-words belong to a page: give --out, a .html")
    pictures, prompt = inputs(images, question, Reading(fps, frames, frames_as_images, max_frames), model)
    rules = _rules(block, layers, zero_inputs)
    options: dict[str, Any] = {"final_norm": final_norm, "knockout": rules, "prefix": prefix, "chat_template": not raw}
    if joint is None:
        reader: Any = load(model, device, dtype, max_pixels, backend, tp)
    else:
        if tp is not None and tp > 1:
            raise InputError("a joint model is not divided between processes: leave --tp out")
        reader = load_joint(joint, device, dtype, max_pixels, backend)
        options["query"] = query
    if answer is None:
        options["max_new_tokens"] = max_new_tokens
    with progress("explaining"):
        ex = reader.explain(pictures, prompt, answer, **options)
        chosen = None if token is None else ex.token_index(_index_or_word(token))
        if verify:
            ex.verify(tokens=None if chosen is None else [chosen], method=method)
        found = ex.sinks() if sinks else None
        if out is not None:
            _save(ex, out, (chosen, method, patch_words), found)
        lenses.read(ex, chosen or 0)
    if as_json:
        result = summary(ex, numbers=False) | lenses.summary()
        if chosen is not None:
            result["tokens"] = [result["tokens"][chosen]]
        result |= {} if found is None else {"sinks": found.tolist()}
        result["saved"] = None if out is None else str(out)
        typer.echo(json.dumps(result, ensure_ascii=False))
    else:
        print_explanation(ex, chosen, method)
        tell_cut([ex])
        print_sinks(found)
        lenses.show(OUT)
        if out is not None:
            OUT.print(f"saved {escape(str(out))}", highlight=False)
    tell_embedded(joint or model, "--model" if joint is None else "--joint")


def _aligned(model: str) -> str:
    """Return the joint model that gradient alignment takes if none is named."""
    if model != EMBEDDED:
        raise InputError("gradient alignment needs a detector: give a joint model with --joint")
    return model


def _save(ex: Explanation, out: Path, what: tuple[int | None, str, bool], without: Tensor | None) -> None:
    """Save an explanation; a .png alone can leave positions out."""
    ex.save(out, *what, without=without if out.suffix.lower() == ".png" else None)


def generate(
    images: Images = None,
    question: Question = None,
    block: Block = None,
    layers: Layers = "all",
    zero_inputs: ZeroInputs = False,
    prefix: Prefix = None,
    raw: Raw = False,
    max_new_tokens: NewTokens = None,
    model: Model = "shapes",
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend = "auto",
    tp: Tp = None,
    fps: Fps = None,
    frames: Frames = None,
    frames_as_images: AsImages = False,
    max_frames: MaxFrames = MAX_FRAMES,
    max_pixels: MaxPixels = MAX_PIXELS,
    as_json: Json = False,
) -> None:
    """Answer a question about an image."""
    reading = Reading(fps, frames, frames_as_images, max_frames)
    pictures, prompt = inputs(images, question, reading, model)
    rules = _rules(block, layers, zero_inputs)
    vlm = load(model, device, dtype, max_pixels, backend, tp)
    with progress("generating"):
        said = vlm.generate(
            pictures, prompt, knockout=rules, prefix=prefix, chat_template=not raw, max_new_tokens=max_new_tokens
        )
    if as_json:
        result = {
            "question": prompt,
            "answer": said.text,
            "finish_reason": said.finish_reason,
            "tokens": said.tokens,
            "token_ids": said.token_ids,
        }
        typer.echo(json.dumps(result, ensure_ascii=False))
    else:
        typer.echo(said.text)
        tell_cut([said])
    tell_embedded(model)


def knockout(
    images: Images = None,
    question: Question = None,
    block: Block = None,
    layers: Layers = "all",
    zero_inputs: ZeroInputs = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write a chart of the shares (.png, .svg).")] = None,
    max_new_tokens: NewTokens = None,
    model: Model = "shapes",
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend = "auto",
    tp: Tp = None,
    fps: Fps = None,
    frames: Frames = None,
    frames_as_images: AsImages = False,
    max_frames: MaxFrames = MAX_FRAMES,
    max_pixels: MaxPixels = MAX_PIXELS,
    as_json: Json = False,
) -> None:
    """Answer with and without a knockout, and show where the generated tokens look, layer by layer.

    Without --block, the three knockouts of arXiv 2411.17491 are compared with the unchanged model.
    """
    from ..knockout.rule import configurations
    from ..models.provenance import made_with, now
    from . import knockout_report

    if out is not None:
        knockout_report.check_chart(out)
    reading = Reading(fps, frames, frames_as_images, max_frames)
    pictures, prompt = inputs(images, question, reading, model)
    compared = configurations(_rules(block, layers, zero_inputs), layers, zero_inputs)
    vlm = load(model, device, dtype, max_pixels, backend, tp)
    rows = []
    for label, rules in compared:
        with progress(f"generating, {label}"):
            said = vlm.generate(pictures, prompt, knockout=rules, attention_share=True, max_new_tokens=max_new_tokens)
        rows.append((label, said))
    made = {**made_with(vlm.model), "date": now(), "question": prompt}
    if out is not None:
        knockout_report.save(rows, prompt, out, made)
    if as_json:
        typer.echo(json.dumps(knockout_report.summary(rows, prompt, out, made), ensure_ascii=False))
    else:
        OUT.print(f"[bold]question[/] {escape(prompt)}", highlight=False)
        OUT.print(knockout_report.table(rows), highlight=False)
        if out is not None:
            OUT.print(f"saved {escape(str(out))}", highlight=False)
    tell_embedded(model)


def _rules(block: list[str] | None, layers: str, zero_inputs: bool) -> list[Knockout]:
    from ..knockout.rule import Knockout

    return [replace(Knockout.parse(text, layers), zero_inputs=zero_inputs) for text in block or []]


def _index_or_word(token: str) -> int | str:
    try:
        return int(token)
    except ValueError:
        return token


_COMMANDS: tuple[Any, ...] = (
    explain,
    generate,
    knockout,
    context.compress,
    context.ask,
    context.kept,
    serve.serve,
    evaluate.evaluate,
    coco.coco,
    joint.joint,
    detect.detect,
    convert.convert,
    machine.info,
    machine.tune,
)
for _name, _command in zip(_ORDER, _COMMANDS, strict=True):
    if isinstance(_command, typer.Typer):
        app.add_typer(_command, name=_name)
    else:
        app.command(_name, cls=Command)(_command)


def main() -> None:
    """Run the commands. Invalid input ends with a one-line message and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a character that the terminal cannot show must not end the command
    try:
        app(prog_name="mllm-fast")
    except (InputError, OSError) as error:
        line = " ".join(str(error).split())
        typer.echo(f"mllm-fast: {line}", err=True)
        sys.exit(2)
