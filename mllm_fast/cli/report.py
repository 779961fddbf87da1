"""Shared parts of the evaluation commands: samples, a progress bar, and saving and printing reports."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape
from rich.table import Table as Printed

from ..core.errors import InputError
from .options import ERR, OUT

if TYPE_CHECKING:
    from ..evaluation.report import Report, Table
    from ..evaluation.run import Progress
    from ..evaluation.samples import Samples


def publish(
    reports: list[tuple[Report, dict[str, Any]]], out: Path, as_json: bool, made: dict[str, Any] | None = None
) -> None:
    """Save the reports and print them. Several reports also get a common page, report.html.

    Args:
        reports: The reports and their settings.
        out: The folder.
        as_json: Print the figures as JSON.
        made: What the model was, see `models.provenance.made_with`; None if no model was asked now.
    """
    from ..core.files import write_whole
    from ..evaluation.report import plain, save, to_html
    from ..models.provenance import now, versions

    made = {**(made or {"versions": versions()}), "date": now()}
    for report, settings in reports:
        (out / report.name).mkdir(parents=True, exist_ok=True)
        save(report, out / report.name, settings, made)
    if len(reports) > 1:
        write_whole(out / "report.html", to_html(reports, "Where a model looks, and what it needs", made).encode())
    if as_json:
        typer.echo(
            json.dumps({report.name: {**plain(report.figures), "failed": report.failed} for report, _ in reports})
        )
        return
    for report, _ in reports:
        _print(report)
    saved = out / "report.html" if len(reports) > 1 else out / reports[0][0].name / "report.html"
    OUT.print(f"saved {escape(str(saved))}", highlight=False)


@contextmanager
def bar(name: str) -> Iterator[Progress]:
    """Show a progress bar on stderr, if it is a terminal, and yield the function that updates it."""
    from tqdm import tqdm

    with tqdm(desc=name, unit="image", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:

        def tell(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield tell


def _print(report: Report) -> None:
    OUT.print(f"[bold]{escape(report.title)}[/]", highlight=False)
    for sentence in report.says:
        OUT.print(escape(sentence), highlight=False)
    for table in report.tables:
        OUT.print(_printed(table), highlight=False)
    for name, why in report.failed.items():
        OUT.print(f"[red]{escape(name)}[/]: {escape(why)}", highlight=False)


def _printed(table: Table) -> Printed:
    printed = Printed(title=table.title, title_justify="left", title_style="bold")
    for i, column in enumerate(table.columns):
        printed.add_column(
            escape(column), justify="right" if table.numeric(i) else "left", overflow="fold", no_wrap=i == 0
        )
    for row in table.rows:
        printed.add_row(*map(escape, row))
    return printed


def tell_notes(samples: Samples) -> None:
    """Tell on stderr what was odd about the files that samples were read from."""
    for note in samples.notes:
        ERR.print(f"[yellow]{escape(note)}[/]", highlight=False, soft_wrap=True)


def samples_of(
    images: Path | None,
    masks: Path | None,
    count: int | None,
    seed: int,
    sample: bool = False,
    orientation: str = "auto",
) -> Samples:
    """Return generated scenes, or the images of a folder.

    Args:
        images: A folder of images; None generates scenes.
        masks: The images' objects, as a file in COCO's format or a folder of .png masks.
        count: How many scenes or images; None takes all images of the folder.
        seed: The seed of the generated scenes, or of the sample.
        sample: Take a random sample of the images in place of the first ones.
        orientation: Which images the masks of a file are of; see `coco`.

    Raises:
        InputError: `count` is less than 1, masks are given without images, or a sample without images or a count.
    """
    from ..evaluation.coco_objects import coco
    from ..evaluation.mask_folder import mask_folder
    from ..evaluation.samples import drawn, pictures, scenes

    if count is not None and count < 1:
        raise InputError(f"--count is at least 1, got {count}")
    if sample and (images is None or count is None):
        raise InputError("--sample takes a number of your images: give --images and --count")
    if images is None:
        if masks is not None:
            raise InputError("--masks belong to images: give their folder with --images")
        return scenes(count or 0, seed)
    first = None if sample else count
    if masks is None:
        found = pictures(images, first)
    elif masks.is_dir():
        found = mask_folder(masks, images, first)
    else:
        found = coco(masks, images, first, orientation=orientation)
    tell_notes(found)
    return drawn(found, count, seed) if sample and count is not None else found
