"""The command `mllm-fast detect`: compare what a model says is in an image with a detector's boxes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ..core.errors import InputError
from .joint import SCENES, Count, Folder, JointName, Masks, Orientation, Processes, Seed, Vocabulary
from .joint_measures import run_evaluation
from .options import OUT, Device, Dtype, Json, loading, progress, tell_embedded
from .report import samples_of

if TYPE_CHECKING:
    from ..joint.presence import Checked, Supported

_DEFAULT = "Describe the image."


def detect(  # long: the options of a command are its parameters
    image: Annotated[Path | None, typer.Argument(help="An image; the sample image if none.")] = None,
    classes: Annotated[
        list[str] | None, typer.Option("--class", "-c", help="What to look for; several. Of shapes: its shapes.")
    ] = None,
    name: JointName = "shapes",
    threshold: Annotated[float, typer.Option(help="Score from which on a box supports a word, 0 to 1.")] = 0.3,
    eyes: Annotated[str, typer.Option(help="The model answers from the detector's embedding (joint) or its own.")] = (
        "joint"
    ),
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Whose answer's nouns are checked.")] = _DEFAULT,
    vocabulary: Vocabulary = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="An image with the boxes (.png); of --report, its folder.")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Many images: AUROC, a tested threshold, distributions.")
    ] = False,
    images: Folder = None,
    masks: Masks = None,
    orientation: Orientation = "auto",
    count: Count = None,
    seed: Seed = 0,
    strength: Annotated[
        list[float] | None, typer.Option(help="--report: how far images are made worse, 0 to 1; several.")
    ] = None,
    processes: Processes = 1,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Find hallucinations: compare what the model says is in an image with a detector's boxes.

    The model is asked whether each class is in the image, and its yes is compared with the detector's best box.
    Every noun of its answer to --prompt that the vocabulary knows is checked in the same way.
    A yes or a noun is a hallucination if no box reaches --threshold.
    --report measures many images.
    """
    if not 0 <= threshold <= 1:
        raise InputError(f"--threshold is 0 to 1, got {threshold}")
    if report:
        if image is not None:
            raise InputError("--report takes a folder of images: --images, with --masks")
        _report(
            name, classes, images, masks, orientation, count, seed, strength, out, processes, device, dtype, as_json
        )
        return
    if images is not None or strength:
        raise InputError("--images and --strength belong to --report; for one image give it alone")
    from ..core.assets import SAMPLE

    if out is not None:
        from ..core.files import check_target

        check_target(out, (".png",))
    with progress("loading the libraries"):
        from ..evaluation.judges.judge import read_vocabulary, shapes_judge
        from ..joint.model import JointModel
        from ..joint.presence import check_classes, check_text
        from ..models.provenance import made_with, now
    words = read_vocabulary(vocabulary) if vocabulary is not None else shapes_judge() if name == "shapes" else None
    wanted = classes or (list(words.nouns) if words is not None else [])
    if not wanted:
        raise InputError("name what to look for: --class dog --class cat, or give a --vocabulary")
    with loading(name):
        joint = JointModel.from_pretrained(name, device=device, dtype=dtype)
    with progress("looking"):
        seen = joint.see(SAMPLE if image is None else image)
        checked = check_classes(joint, seen, wanted, threshold, eyes)
        text = (
            joint.generate(seen, prompt).text
            if eyes == "joint"
            else joint.vlm.generate(seen.vision.picture, prompt).text
        )
        supported = [] if words is None else check_text(joint, seen, text, words, threshold)
    made = {**made_with(joint.vlm.model), "date": now(), "joint": name, "threshold": threshold, "prompt": prompt}
    if out is not None:
        _draw(seen.vision.picture, checked, supported, out, made)
    if as_json:
        facts = _plain(checked, prompt, text, supported, seen.note, out) | {"provenance": made}
        typer.echo(json.dumps(facts, ensure_ascii=False))
    else:
        _print(checked, prompt, text, supported, words is not None)
        if seen.note:
            OUT.print(escape(seen.note), highlight=False)
        if out is not None:
            OUT.print(f"saved {escape(str(out))}", highlight=False)
    tell_embedded(name, "--joint")


def _report(
    name: str,
    classes: list[str] | None,
    images: Path | None,
    masks: Path | None,
    orientation: str,
    count: int | None,
    seed: int,
    strength: list[float] | None,
    out: Path | None,
    processes: int,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    with progress("loading the libraries"):
        from ..evaluation.joint.hallucination import Hallucination
        from ..shapes.scenes import SHAPES
    if images is not None and masks is None:
        raise InputError("--report needs to know what is there: give --masks, COCO's .json or a folder of .png")
    first = SCENES if count is None and images is None else count
    samples = samples_of(images, masks, first, seed, orientation=orientation)
    if not classes:
        named = {thing.name for sample in samples.list for thing in sample.things or ()}
        classes = list(SHAPES) if images is None else sorted(named)
    evaluation = Hallucination(name, classes, strength or (0.0,))
    run_evaluation(evaluation, samples, out or Path("mllm-fast-detect"), processes, device, dtype, as_json)
    if images is not None:
        tell_embedded(name, "--joint")


def _draw(picture: Any, checked: list[Checked], supported: list[Supported], out: Path, made: dict[str, Any]) -> None:
    from ..core.files import whole_file
    from ..core.png_notes import png_notes
    from ..drawing.boxes import Labelled, draw_boxes

    boxes = [
        Labelled(one.box, f"{one.name} {one.score:.2f}" + ("" if one.supported else " ?"), one.supported)
        for one in sorted(checked, key=lambda one: one.score)
        if one.supported or one.hallucinated
    ]
    boxes += [
        Labelled(one.box.box, f"{one.phrase} {one.box.score:.2f} ?", False) for one in supported if not one.supported
    ]
    with whole_file(out) as path:
        draw_boxes(picture, boxes).save(path, "PNG", pnginfo=png_notes(made))


def _plain(
    checked: list[Checked], prompt: str, text: str, supported: list[Supported], note: str, out: Path | None
) -> dict[str, Any]:
    return {
        "classes": [
            {
                "class": one.name,
                "yes": one.yes,
                "score": one.score,
                "box": list(one.box),
                "supported": one.supported,
                "hallucinated": one.hallucinated,
            }
            for one in checked
        ],
        "prompt": prompt,
        "text": text,
        "nouns": [
            {"phrase": one.phrase, "score": one.box.score, "box": list(one.box.box), "supported": one.supported}
            for one in supported
        ],
        "note": note,
        "saved": None if out is None else str(out),
    }


def _print(checked: list[Checked], prompt: str, text: str, supported: list[Supported], known: bool) -> None:
    table = Table(title="is it there?", title_justify="left", title_style="bold")
    for column, side in (("class", "left"), ("model's yes", "right"), ("best box", "right"), ("at, pixels", "left")):
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    table.add_column("verdict")
    for one in checked:
        says = one.yes >= 0.5
        verdict = {
            (True, True): "there",
            (True, False): "[red]said, but no box supports it[/]",
            (False, True): "[yellow]not said, but a box shows it[/]",
            (False, False): "not there",
        }[says, one.supported]
        table.add_row(escape(one.name), f"{one.yes:.2f}", f"{one.score:.2f}", _place(one.box), verdict)
    OUT.print(table, highlight=False)
    OUT.print(f"[bold]{escape(prompt)}[/] {escape(text)}", highlight=False)
    for noun in supported:
        verdict = "supported" if noun.supported else "[red]no box supports it[/]"
        OUT.print(
            f"  {escape(noun.phrase)}: best box {noun.box.score:.2f}, {_place(noun.box.box)}: {verdict}",
            highlight=False,
        )
    if not known:
        OUT.print("give a --vocabulary to check the nouns of this answer", style="dim", highlight=False)


def _place(box: tuple[float, float, float, float]) -> str:
    left, top, right, bottom = box
    return f"x {left:.0f}-{right:.0f}, y {top:.0f}-{bottom:.0f}"
