"""The commands `mllm-fast joint train | import | finetune`, and the options of all of `mllm-fast joint`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from ..core.errors import InputError
from .options import OUT, Device, Dtype, Json, Model, loading, progress
from .shown import Command, Group

if TYPE_CHECKING:
    from ..joint.training_data import Pictures

joint = typer.Typer(
    cls=Group, no_args_is_help=True, help="One vision embedding for a detector and a language model (arXiv 2405.14612)."
)
SCENES, _TAUGHT, _TUNED = 100, 30_000, 2_000
DetectorName = Annotated[
    str, typer.Option(help="An OWL-ViT or OWLv2: a folder or a hub id; 'shapes' is the embedded one.")
]
JointName = Annotated[str, typer.Option("--joint", help="A folder that `joint train` wrote, or 'shapes'.")]
Folder = Annotated[
    Path | None, typer.Option("--images", "-i", help="A folder of images; generated scenes if none is given.")
]
Masks = Annotated[Path | None, typer.Option(help="Their objects: COCO's .json, or a folder of .png masks.")]
Orientation = Annotated[
    str, typer.Option(help="Photos turned by EXIF data: COCO's masks are of the upright or the stored image, or auto.")
]
OutFolder = Annotated[Path, typer.Option("--out", "-o", help="Folder of rows and report; used again, it goes on.")]
Count = Annotated[int | None, typer.Option(help="How many images; all of a folder.")]
Seed = Annotated[int, typer.Option(help="The seed of the generated scenes.")]
Processes = Annotated[int, typer.Option(help="Each with its own models; the numbers do not depend on it.")]
Vocabulary = Annotated[
    Path | None, typer.Option(help='Objects of descriptions: a JSON file {"nouns": {"dog": ["puppy"]}}.')
]


@joint.command(cls=Command)
def train(  # long: the options of a command are its parameters
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of W; used again, training goes on.")],
    detector: DetectorName = "shapes",
    model: Model = "shapes",
    images: Folder = None,
    count: Count = None,
    kind: Annotated[
        str,
        typer.Option(
            help="The kind of W: mlp (each token, two hidden layers), projector (LLaVA's shape), transformer."
        ),
    ] = "mlp",
    hidden: Annotated[
        int | None,
        typer.Option(help="Width of W's hidden layers; twice the language model's if none, 8192 for LLaVA-7B."),
    ] = None,
    layers: Annotated[int, typer.Option(help="The layers of a transformer W.")] = 2,
    heads: Annotated[int, typer.Option(help="The heads of a transformer W.")] = 8,
    wide: Annotated[
        bool, typer.Option("--wide", help="A transformer W as wide as the language model, as the paper's.")
    ] = False,
    view: Annotated[
        str,
        typer.Option(
            help="What of an image both models see: whole (squashed to a square), or crop (the processor's own)."
        ),
    ] = "whole",
    epochs: Annotated[int, typer.Option(help="How often each image is seen.")] = 1,
    batch: Annotated[int, typer.Option(help="Images a device and step.")] = 16,
    accumulate: Annotated[int, typer.Option(help="Batches a step of the optimiser.")] = 1,
    rate: Annotated[float, typer.Option(help="AdamW's learning rate.")] = 1e-4,
    direction: Annotated[
        str,
        typer.Option(
            help="What is mapped: detector-to-model, or model-to-detector, for boxes from the language model's eyes."
        ),
    ] = "detector-to-model",
    schedule: Annotated[str, typer.Option(help="How the rate goes: cosine, or constant, as in the paper.")] = "cosine",
    precision: Annotated[str, typer.Option(help="The mixed precision of training: no, bf16 or fp16.")] = "no",
    every: Annotated[int, typer.Option(help="Steps between two measurements, each with a checkpoint.")] = 200,
    seed: Annotated[int, typer.Option(help="The seed of the first weights, the order and the generated scenes.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Train W, which maps the detector's image embeddings to the language model's, without labels.

    If a run is stopped, the same command goes on from its last checkpoint.
    To use all GPUs, start it with `accelerate launch -m mllm_fast.cli joint train ...`.
    """
    with progress("loading the libraries"):
        from tqdm import tqdm

        from ..joint.alignment import AlignmentConfig
        from ..joint.checkpoint import REVERSE, detector_name
        from ..joint.detector import Detector
        from ..joint.reverse import vision_embeddings
        from ..joint.train import CURVE, TrainConfig
        from ..joint.train import train as run
        from ..vlm import VLM
    config = TrainConfig(
        epochs,
        batch,
        accumulate,
        rate,
        precision,
        every=every,
        seed=seed,
        view=view,
        schedule=schedule,
        direction=direction,
    )
    pictures = _pictures(images, _TAUGHT if images is None and count is None else count, seed)
    with loading(detector, model):
        owl = Detector.from_pretrained(detector_name(detector), device=None if device == "auto" else device)
        vlm = VLM.from_pretrained(model, device=device, dtype=dtype)
    width = vlm.text.width
    if hidden is None:  # the paper's width for its models; LLaVA's projector is as wide as its language model
        hidden = width if kind == "projector" else 2 * width
    ends = owl.width, width
    if direction == REVERSE:
        ends = vision_embeddings(vlm, [pictures[0]])[0].shape[-1], owl.width
    shape = AlignmentConfig(kind, *ends, hidden, layers, heads, width=width if wide else 0)
    first = int(os.environ.get("RANK", "0")) == 0  # only the first of several processes prints
    with tqdm(desc="training W", unit="step", file=sys.stderr, disable=not (first and sys.stderr.isatty())) as shown:

        def tell(done: int, total: int, what: str) -> None:
            shown.total = total
            shown.set_postfix_str(what)
            shown.update(done - shown.n)

        run(owl, vlm, (detector, model), pictures, out, shape, config, tell)
    if not first:
        return
    curve = json.loads((out / CURVE).read_text())
    last = curve["curve"][-1]
    drawn = _chart(curve["curve"], out / "curve.png")
    if as_json:
        typer.echo(json.dumps({"saved": str(out), "skipped": curve["skipped"], **last}))
        return
    OUT.print(
        f"W is {last['distance']:.3f} away on images it was not taught (1: as far as their mean), cosine"
        f" {last['cosine']:.3f}, after {last['step']} steps",
        highlight=False,
    )
    OUT.print(f"saved {escape(str(out))}" + ("" if drawn else "; no curve.png without matplotlib"), highlight=False)


@joint.command("import", cls=Command)
def import_released(
    file: Annotated[Path, typer.Argument(help="A W of the paper's authors: .pth, .pt or .safetensors.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the joint model.")],
    detector: DetectorName = "google/owlvit-base-patch32",
    model: Annotated[
        str, typer.Option(help="The language model that W belongs to, a folder or a hub id.")
    ] = "llava-hf/llava-1.5-7b-hf",
    as_json: Json = False,
) -> None:
    """Make a joint model of a W that the authors of arXiv 2405.14612 released.

    The file does not say which models it belongs to; by default they are the authors'.
    """
    from dataclasses import asdict

    from ..joint.checkpoint import WEIGHTS, write_settings
    from ..joint.released import read_released
    from ..joint.whole_image import WHOLE

    if (out / WEIGHTS).exists():
        raise InputError(f"{out}: holds a trained alignment; give another folder, or remove it")
    alignment = read_released(file)
    out.mkdir(parents=True, exist_ok=True)
    alignment.save(out / WEIGHTS)
    write_settings(out, detector, model, WHOLE)
    if as_json:
        typer.echo(json.dumps({"saved": str(out), "shape": asdict(alignment.config)}))
        return
    shape = alignment.config
    OUT.print(
        f"W maps {shape.inputs} numbers a token to {shape.outputs}, through hidden layers of {shape.hidden}",
        highlight=False,
    )
    OUT.print(f"saved {escape(str(out))}", highlight=False)


@joint.command(cls=Command)
def finetune(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new joint model.")],
    name: JointName = "shapes",
    images: Folder = None,
    count: Count = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="What the model is asked; several are asked in turn.")
    ] = None,
    rank: Annotated[int, typer.Option(help="The rank of the adapters.")] = 8,
    epochs: Annotated[int, typer.Option(help="How often each image is seen.")] = 1,
    batch: Annotated[int, typer.Option(help="Images a step of the optimiser.")] = 8,
    rate: Annotated[float, typer.Option(help="AdamW's learning rate.")] = 1e-4,
    precision: Annotated[str, typer.Option(help="The mixed precision of training: no, bf16 or fp16.")] = "no",
    seed: Annotated[int, typer.Option(help="The seed of the order and the generated scenes.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Fine-tune W and LoRA adapters of the language model to answer from the detector's image embedding.

    The model learns to give the answers that it gives from its own image embedding.
    """
    with progress("loading the libraries"):
        from tqdm import tqdm

        from ..joint.checkpoint import joint_folder, read_settings
        from ..joint.finetune import FinetuneConfig
        from ..joint.finetune import finetune as run
        from ..joint.model import JointModel
    prompts = tuple(prompt or ("Describe the image.",))
    config = FinetuneConfig(prompts, rank, epochs, batch, rate, precision, seed=seed)
    pictures = _pictures(images, _TUNED if images is None and count is None else count, seed)
    parts = read_settings(joint_folder(name))
    names = parts["detector"], parts["model"]
    with loading(name):
        model = JointModel.from_pretrained(name, device=device, dtype=dtype)
    with tqdm(desc="fine-tuning", unit="step", file=sys.stderr, disable=not sys.stderr.isatty()) as shown:

        def tell(done: int, total: int, what: str) -> None:
            shown.total = total
            shown.set_postfix_str(what)
            shown.update(done - shown.n)

        losses = run(model, names, pictures, out, config, tell)
    first, last = (sum(part) / len(part) for part in (losses[:5], losses[-5:]))
    if as_json:
        typer.echo(json.dumps({"saved": str(out), "steps": len(losses), "first_loss": first, "last_loss": last}))
        return
    OUT.print(
        f"loss {first:.3f} over the first five steps, {last:.3f} over the last five of {len(losses)}", highlight=False
    )
    OUT.print(f"saved {escape(str(out))}", highlight=False)


def _pictures(images: Path | None, count: int | None, seed: int) -> Pictures:
    from ..joint.training_data import Folder as Pictured
    from ..joint.training_data import Scenes

    if count is not None and count < 1:
        raise InputError(f"--count is at least 1, got {count}")
    return Scenes(count or 0, seed) if images is None else Pictured(images, count)


def _chart(curve: list[dict[str, Any]], path: Path) -> bool:
    """Draw the validation curve of a training. Return False if matplotlib is not installed."""
    from importlib.util import find_spec

    from ..core.files import write_whole
    from ..evaluation.report import COLORS, Chart

    if find_spec("matplotlib") is None:
        return False

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        steps = [entry["step"] for entry in curve]
        axes.plot(steps, [entry["distance"] for entry in curve], color=COLORS[1], marker="o", label="distance")
        axes.plot(
            steps, [entry["cosine"] for entry in curve], color=COLORS[0], linestyle="--", marker="s", label="cosine"
        )
        axes.set_xlabel("step")
        axes.set_ylabel("on held-out images")
        axes.set_ylim(0, max(1.05, *(1.05 * entry["distance"] for entry in curve[1:] or curve)))
        axes.grid(alpha=0.25)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)

    write_whole(path, Chart("curve", draw, "", (7.0, 3.6)).png())
    return True
