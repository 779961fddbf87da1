"""The command `mllm-fast coco`: choose COCO's photos of one animal and its colour."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import InputError
from ..core.images import MAX_PIXELS
from .options import OUT, Backend, Device, Dtype, Json, Model, load

if TYPE_CHECKING:
    from ..evaluation.coco_colors import Photo


def coco(  # long: the options of a command are its parameters
    annotations: Annotated[Path, typer.Option(help="COCO's objects, as in instances_val2017.json.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the files for eval, and of the list of photos.")],
    captions: Annotated[
        Path | None, typer.Option(help="COCO's captions, as in captions_val2017.json: colours are read from them.")
    ] = None,
    colors: Annotated[
        Path | None, typer.Option(help="A .csv with the columns file_name and color; it goes before the captions.")
    ] = None,
    ask: Annotated[
        Path | None,
        typer.Option(help="The folder of the photos: the model is asked where no other source has a colour."),
    ] = None,
    animal: Annotated[
        list[str] | None, typer.Option(help="A category that counts, two or more; COCO's ten animals by default.")
    ] = None,
    count: Annotated[int | None, typer.Option(help="A random sample of so many photos; all by default.")] = None,
    seed: Annotated[int, typer.Option(help="The seed of the sample, and of the other animal of a sentence.")] = 0,
    model: Model = "shapes",
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Choose COCO's photos of one animal and its colour, for the evaluations heads and evidence.

    The folder --out gets objects.json for --masks, vocabulary.json for --vocabulary, sentences.csv with the sentences
    of arXiv 2411.10950, and manifest.csv, which says of every photo why it was dropped.
    """
    if captions is None and colors is None and ask is None:
        raise InputError("the animals' colours are not known: give --captions, --colors or --ask")
    if ask is not None and not ask.is_dir():
        raise InputError(f"{ask}: is no folder of photos")
    from ..evaluation import coco_colors

    animals = tuple(animal or coco_colors.ANIMALS)
    if len(set(animals)) < 2:
        raise InputError(f"--animal is given for two categories or more, got {', '.join(animals)}")
    photos, content = coco_colors.read_photos(annotations, animals)
    told = None if captions is None else coco_colors.read_captions(captions)
    table = None if colors is None else coco_colors.read_colors(colors)
    answer = None
    if ask is not None:
        vlm = load(model, device, dtype, MAX_PIXELS, backend)
        folder = ask

        def answer(photo: Photo) -> str:
            question = f"What is the color of the {photo.animal}?"
            return vlm.generate(folder / photo.file_name, question, max_new_tokens=16, do_sample=False).text

    found = coco_colors.with_sample(coco_colors.with_colors(photos, told, table, answer), count, seed)
    used = coco_colors.write_folder(found, content, out, seed, animals)
    dropped: dict[str, int] = {}
    for photo in found:
        if photo.reason:
            why = photo.reason.split(":")[0]
            dropped[why] = dropped.get(why, 0) + 1
    if as_json:
        typer.echo(json.dumps({"saved": str(out), "used": used, "dropped": dropped}))
        return
    OUT.print(f"{used} of {len(found)} photos show one animal of a known colour", highlight=False)
    for why, number in sorted(dropped.items(), key=lambda one: -one[1])[:10]:
        OUT.print(f"  {number} dropped: {why}", highlight=False)
    OUT.print(
        f"saved {out}; go on with: mllm-fast eval evidence --images FOLDER --masks {out / 'objects.json'} --vocabulary"
        f" {out / 'vocabulary.json'}",
        highlight=False,
        soft_wrap=True,
    )
