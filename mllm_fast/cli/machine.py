"""The commands `mllm-fast info` and `mllm-fast tune`: what this machine and a model are, and the kernels' choices."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from .. import __version__
from ..core.errors import InputError
from .options import OUT, Device, Dtype, Json, load


def info(
    model: Annotated[
        str | None,
        typer.Option(
            help="Show the parts that were found in this model, and what works with it, in place of the rest."
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Show versions, devices, and which kernel each operation uses on this machine, and why; or a model's parts."""
    if model is not None:
        _model_info(model, device, dtype, as_json)
        return
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from ..kernels import backend_report
    from ..models.architectures import ARCHITECTURES

    versions = {"mllm-fast": __version__}
    for package in ("torch", "transformers", "triton"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts: dict[str, Any] = {
        "versions": versions,
        "python": sys.version.split()[0],
        "gpus": gpus,
        "cpu_threads": torch.get_num_threads(),
        "architectures": list(ARCHITECTURES),
        "operations": backend_report(),
    }
    if as_json:
        typer.echo(json.dumps(facts))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("versions", escape(", ".join(f"{name} {number}" for name, number in versions.items())))
    table.add_row("python", facts["python"])
    table.add_row("GPUs", escape(", ".join(gpus) or "none: everything runs on the CPU"))
    table.add_row("CPU threads", str(facts["cpu_threads"]))
    table.add_row("architectures", ", ".join(ARCHITECTURES))
    for name, line in facts["operations"].items():
        table.add_row(name, escape(line))
    OUT.print(table, highlight=False)


def tune(as_json: Json = False) -> None:
    """Measure which path of each kernel is the fastest on this machine, in two seconds, and keep the result.

    A model does so the first time on a machine. Measure again when the machine was busy then.
    """
    import torch

    from ..kernels import paths, tuning

    try:
        found = tuning.tune()
    except RuntimeError as error:
        raise InputError(f"nothing to measure: {error}") from None
    kept = paths.cache_file() if paths.read_measured() is not None else None
    facts: dict[str, Any] = {
        "processor": paths.processor(),
        "cpu_threads": torch.get_num_threads(),
        "paths": found.path,
        "milliseconds": {
            use: {path: seconds * 1e3 for path, seconds in each.items()} for use, each in found.seconds.items()
        },
        "rows": found.rows,
        "kept": None if kept is None else str(kept),
    }
    if as_json:
        typer.echo(json.dumps(facts))
        return
    OUT.print(f"{escape(facts['processor'])}, {facts['cpu_threads']} threads", highlight=False)
    table = Table("operation", "calls", "type", "milliseconds (the chosen path in bold)", box=None, pad_edge=False)
    for use, each in facts["milliseconds"].items():
        chosen = found.path[use]
        told = [
            f"[bold]{path} {took:.3g}[/]" if path == chosen else f"{path} {took:.3g}"
            for path, took in each.items()
            if "rows" not in path
        ]
        table.add_row(*use.split("/"), ", ".join(told))
    OUT.print(table, highlight=False)
    for name, (least, most) in found.rows.items():
        served = f"{least} to {most} rows" if most else "no rows"
        OUT.print(f"linear layers in {name}: the kernel computes {served}, torch the others", highlight=False)
    where = "kept for this process alone: the cache cannot be written" if kept is None else f"kept in {kept}"
    OUT.print(escape(where), highlight=False, soft_wrap=True)


def _model_info(name: str, device: str | None, dtype: str | None, as_json: bool) -> None:
    from ..core.images import MAX_PIXELS
    from .model_info import model_facts

    facts = model_facts(load(name, device, dtype, MAX_PIXELS, "auto"))
    if as_json:
        typer.echo(json.dumps(facts))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    sites = facts["attention"]
    table.add_row("type", facts["type"])
    table.add_row("layers", f"{facts['layers']}, {len(sites)} of them with attention")
    for kind in dict.fromkeys(facts["layers without attention"].values()):
        layers = [layer for layer, one in facts["layers without attention"].items() if one == kind]
        table.add_row("", escape(f"{kind}: {', '.join(layers)}"))
    shown = ("heads", "key and value heads", "key size", "value size", "gated", "sliding window", "multiplier")
    for line in dict.fromkeys(", ".join(f"{name} {site[name]}" for name in shown) for site in sites):
        table.add_row("attention", escape(line))
    table.add_row("output projection", escape(sites[0]["output projection"]))
    if sites[0]["norm behind it"]:
        table.add_row("norm behind it", escape(sites[0]["norm behind it"]))
    table.add_row("final norm", escape("{path} ({kind}, gain: {gain})".format(**facts["final norm"])))
    head = facts["unembedding"]
    table.add_row("unembedding", escape(f"{head['path']}, scale {head['scale']:g}, soft cap {head['soft cap']}"))
    table.add_row("image token", f"{facts['image token']}, separators {facts['image separators']}")
    table.add_row("decoding", escape(facts["decoding"]))
    for feature, outcome in facts["features"].items():
        table.add_row(feature, escape(outcome))
    OUT.print(table, highlight=False)
