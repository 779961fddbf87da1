"""The command `mllm-fast convert`: a checkpoint of InternVL's own code for transformers' classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import InputError
from .options import OUT, Json


def convert(
    source: Annotated[str, typer.Argument(help="A folder of the model type internvl_chat, or its hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; it does not exist yet.")],
    system: Annotated[
        str | None, typer.Option(help="The system message of conversations that bring none; none by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint of InternVL's own code, such as OpenGVLab/InternVL2-8B, to the layout of transformers.

    Language models of the types internlm2, llama, qwen2 and qwen3 are read. The folder's Python files are not run.
    """
    if out.exists():
        raise InputError(f"{out}: exists already; give the name of a new folder")
    from ..models import internvl_chat

    folder = Path(source)
    if not folder.is_dir():
        folder = _download(source)
    tensors = internvl_chat.convert(folder, out, system)
    if as_json:
        typer.echo(json.dumps({"saved": str(out), "tensors": tensors}))
        return
    OUT.print(
        f"saved {out} with {tensors} tensors; go on with: mllm-fast explain --model {out}",
        highlight=False,
        soft_wrap=True,
    )


def _download(name: str) -> Path:
    """Return the folder of a model of the hub: its data files alone."""
    from huggingface_hub import snapshot_download

    from ..models.loading import failures

    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f"{name}: no such model folder; give a folder or a hub id")
    with failures(name):
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.safetensors", "tokenizer.model"]))
