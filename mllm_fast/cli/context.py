"""The commands `mllm-fast compress | ask | kept`: read an image once and ask many questions about it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from rich.markup import escape
from rich.table import Table

from ..context.registry import PRUNING_SCORES
from ..core.errors import InputError, check_choice
from ..core.images import MAX_PIXELS
from ..core.keep import parse_keep
from ..core.video import MAX_FRAMES
from .options import (
    ERR,
    OUT,
    AsImages,
    Backend,
    ContextModel,
    Device,
    Dtype,
    Fps,
    Frames,
    Images,
    Json,
    MaxFrames,
    MaxPixels,
    Model,
    NewTokens,
    Reading,
    Tp,
    inputs,
    load,
    progress,
    tell_cut,
    tell_embedded,
)

if TYPE_CHECKING:
    from ..context.context import Context

File = Annotated[Path, typer.Argument(metavar="CONTEXT", help="A file that compress wrote.")]


def compress(  # long: the options of a command are its parameters
    images: Images = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The .safetensors file to write.")] = Path(
        "context.safetensors"
    ),
    keep: Annotated[str, typer.Option(help="Image tokens kept a layer: a share (0.05, 5%) or a count (29).")] = "5%",
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="What the model is asked first.")
    ] = "Describe the image.",
    score: Annotated[
        str, typer.Option(help=f"What an image token is kept for: {', '.join(PRUNING_SCORES)}.")
    ] = "generated",
    parts: Annotated[str, typer.Option(help="What is kept: query+image, query or image.")] = "query+image",
    budget: Annotated[
        str, typer.Option(help="What --keep is a share of: all image tokens, or those of each frame.")
    ] = "all",
    storage: Annotated[
        str, typer.Option(help="How the file stores numbers: full, or int8 at a quarter of the size.")
    ] = "full",
    max_new_tokens: Annotated[int, typer.Option(help="Longest reply to the prompt, in tokens.")] = 64,
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
    """Read an image once and write a compressed context of it to a file.

    The file stores the keys and values of the tokens worth keeping.
    The command ask answers questions from it without reading the image again.
    """
    from ..context.file_format import ENDINGS, STORAGES
    from ..core.files import check_target

    check_target(out, ENDINGS)
    share = parse_keep(keep)
    check_choice("--storage", storage, STORAGES)
    pictures, _ = inputs(images, prompt, Reading(fps, frames, frames_as_images, max_frames), model)
    vlm = load(model, device, dtype, max_pixels, backend, tp)
    with progress("reading the image"):
        ctx = vlm.compress(pictures, share, prompt, score, parts=parts, budget=budget, max_new_tokens=max_new_tokens)  # type: ignore[arg-type]
        errors = ctx.save(out, storage)
    facts = {
        "saved": str(out),
        "file_bytes": out.stat().st_size,
        "tokens": ctx.num_tokens,
        "prefix_tokens": ctx.prefix_length,
        "image_tokens_kept": ctx.settings["kept"],
        "image_tokens": len(ctx.layout.positions("image")),
        "bytes": ctx.nbytes,
        "uncompressed_bytes": ctx.full_nbytes,
        "peak_bytes": ctx.peak_nbytes,
        "description": ctx.description,
        "storage_error": errors,
    }
    if as_json:
        typer.echo(json.dumps(facts, ensure_ascii=False))
    else:
        _show_compressed(facts, ctx)
    tell_embedded(model)


def _show_compressed(facts: dict[str, Any], ctx: Context) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    if ctx.description:
        table.add_row("reply", escape(ctx.description))
    table.add_row("image tokens", f"{facts['image_tokens_kept']} of {facts['image_tokens']} a layer")
    table.add_row("all tokens", f"{ctx.num_tokens} of {ctx.prefix_length}")
    table.add_row(
        "keys and values", f"{_size(ctx.nbytes)} of {_size(ctx.full_nbytes)}; at the peak {_size(ctx.peak_nbytes)}"
    )
    if errors := facts["storage_error"]:
        table.add_row("int8 error", f"keys {errors['keys']:.2%}, values {errors['values']:.2%}")
    table.add_row("saved", f"{escape(facts['saved'])}, {_size(facts['file_bytes'])}")
    OUT.print(table, highlight=False)


def ask(
    context: File,
    questions: Annotated[list[str] | None, typer.Argument(metavar="QUESTION", help="None: a prompt, or stdin.")] = None,
    file: Annotated[Path | None, typer.Option("--questions", "-f", help="A file with a question a line.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered together.")] = 32,
    max_new_tokens: NewTokens = None,
    model: ContextModel = None,
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend = "auto",
    tp: Tp = None,
    max_pixels: MaxPixels = MAX_PIXELS,
    as_json: Json = False,
) -> None:
    """Answer questions about an image from a context file that compress wrote.

    Give questions as arguments, in a file with --questions, or one per line on stdin.
    Without any question, a terminal starts a conversation, in which each question sees the earlier ones.
    """
    asked = [*(questions or []), *(_lines(file) if file else [])]
    if file is not None and not asked:
        raise InputError(f"{file}: there is no question in it; write one a line")
    if not asked and tp is not None and tp > 1:
        raise InputError("with --tp questions are given behind the context, or in a file with --questions")
    ctx, answering = _context(context, model, device, dtype, max_pixels, backend, tp=tp)
    if not asked and not sys.stdin.isatty():
        try:
            asked = _questions(sys.stdin)
        except UnicodeDecodeError:
            raise InputError("stdin is not UTF-8 text") from None
        if not asked:
            raise InputError("there is no question: give one behind the context, in a file, or on stdin")
    if not asked:
        tell_embedded(answering)
        _converse(ctx, max_new_tokens)
        return
    with progress(f"answering {len(asked)} questions"):
        answers = ctx.ask_many(asked, max_new_tokens=max_new_tokens, batch_size=batch_size)
    if as_json:
        rows = [
            {"question": q, "answer": a.text, "finish_reason": a.finish_reason}
            for q, a in zip(asked, answers, strict=True)
        ]
        typer.echo(json.dumps(rows[0] if len(rows) == 1 else rows, ensure_ascii=False))
    else:
        for question, answer in zip(asked, answers, strict=True):
            typer.echo(answer.text if len(asked) == 1 else f"{question}\t{answer.text}")
        tell_cut(answers)
    tell_embedded(answering)


def kept(
    context: File,
    images: Annotated[list[Path] | None, typer.Option("--image", "-i", help="The image, to draw upon.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write a .png of what each layer keeps.")] = None,
    model: ContextModel = None,
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend = "auto",
    max_pixels: MaxPixels = MAX_PIXELS,
    as_json: Json = False,
) -> None:
    """Show which image tokens a context keeps, layer by layer."""
    from ..context.figure import ENDINGS, save_kept
    from ..core.files import check_target
    from ..knockout.rule import spans

    if out is not None:
        check_target(out, ENDINGS)
    ctx, _ = _context(context, model, device, dtype, max_pixels, backend, images)
    if out is not None:
        save_kept(ctx, out)
    layers = [ctx.kept(layer) for layer in range(len(ctx.positions))]
    if as_json:
        rows = [
            {"positions": k.positions.tolist(), "image": k.images.tolist(), "boxes": k.boxes.tolist()} for k in layers
        ]
        facts = {
            "settings": ctx.settings,
            "prompt": ctx.prompt,
            "layers": rows,
            "saved": None if out is None else str(out),
        }
        typer.echo(json.dumps(facts, ensure_ascii=False))
        return
    OUT.print(f"[bold]prompt[/] {escape(ctx.prompt)}   [bold]score[/] {ctx.settings['score']}", highlight=False)
    shared = set(layers[0].positions.tolist()).intersection(*(k.positions.tolist() for k in layers))
    table = Table()
    table.add_column("layer", justify="right")
    table.add_column("image tokens kept, as positions of the sequence", overflow="fold")
    for i, layer in enumerate(layers):
        table.add_row(str(i), spans(layer.positions.tolist()))
    OUT.print(table, highlight=False)
    count, every = len(layers[0].positions), len(ctx.layout.positions("image"))
    OUT.print(f"{count} of {every} image tokens a layer; {len(shared)} in every layer", highlight=False)
    if out is not None:
        OUT.print(f"saved {escape(str(out))}", highlight=False)


def _context(
    path: Path,
    model: str | None,
    device: str | None,
    dtype: str | None,
    max_pixels: int,
    backend: str,
    images: list[Path] | None = None,
    tp: int | None = None,
) -> tuple[Context, str]:
    """Return a context and the name of its model: the one that is given, or else the one that the file names."""
    if not path.exists():
        raise InputError(f"{path}: there is no such file; mllm-fast compress makes one")
    with progress("loading the libraries"):
        from ..context.context import Context
        from ..context.file_format import read_origin
    if model is None:
        model, made = read_origin(path)
        dtype = dtype or made  # a context belongs to its model's number type as well
    vlm = load(model, device, dtype, max_pixels, backend, tp)
    return Context.load(path, vlm, images or []), model


def _converse(ctx: Context, max_new_tokens: int | None) -> None:
    """Answer one question per line until the end of input. Each question sees the earlier ones."""
    ERR.print("[dim]ask about the image; an empty line or Ctrl-D ends[/]", highlight=False)
    chat = ctx.chat()
    while True:
        try:
            question = click.prompt("", default="", show_default=False, prompt_suffix="> ", err=True).strip()
        except click.Abort:
            break
        if not question:
            break
        try:
            typer.echo(chat.ask(question, max_new_tokens=max_new_tokens).text)
        except InputError as error:
            typer.echo(f"mllm-fast: {error}", err=True)


def _lines(path: Path) -> list[str]:
    try:
        return _questions(path.read_text(encoding="utf-8-sig").splitlines())
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text; save it as such") from None


def _questions(lines: Iterable[str]) -> list[str]:
    return [line.strip() for line in lines if line.strip()]


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"
