"""The file format of a context: safetensors, with all that a reader needs to refuse a file that does not fit.

Tensors:
    keys, values: [L, Hkv, M, D] in the model's type, or int8.
    keys_scale: float32 [L, Hkv, 1, D], with int8 only.
    values_scale: float32 [L, Hkv, M, 1], with int8 only.
    positions: int32 [L, M].
    input_ids: int32 [N].
    state.LAYER.NAME.KEY: the tensors of layers without attention, of hybrid models only.

The metadata entry "mllm_fast.context" is one JSON object (see `_describe`). The entry "mllm_fast.checksum" is the
checksum of that object and of all tensors. It detects damage, but it is not a signature.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.assets import EMBEDDED, SHAPES_WEIGHTS
from ..core.errors import InputError, check_choice, first_line
from ..core.files import check_target, whole_file
from ..core.layout import TokenLayout, images_of, plain_images
from ..core.split import by_first
from ..models.fingerprint import fingerprint
from ..models.offload import home_of
from ..models.provenance import model_name, now, versions
from ..runtime.model_runner import ModelRunner
from ..runtime.recurrent import plain_of, state_from, tensors_of
from .file_checks import check_description, check_finite

Fields = dict[str, Any]  # the attributes of a `Context`, by name

VERSION = 1
STORAGES = ("full", "int8")
ENDINGS = (".safetensors",)
_log = logging.getLogger(__name__)
_ROW = 8 * 512  # bytes of one row: 512 words of 64 bits
_PART = 256 * _ROW  # bytes summed at a time, few enough to stay in the CPU's cache


def save(fields: Fields, path: str | os.PathLike[str], storage: str = "full") -> dict[str, float]:
    """See `Context.save`."""
    target, split = Path(path), fields["vlm"].text.split
    check_choice("storage", storage, STORAGES)
    by_first(split, partial(check_target, target, ENDINGS))
    tensors, metadata, errors = pack(fields, storage)

    def write() -> None:
        with whole_file(target) as name:
            save_file(tensors, name, metadata)

    by_first(split, write)
    return errors


def load(path: str | os.PathLike[str], vlm: ModelRunner, images: Sequence[Any] = ()) -> Fields:
    """Return the fields that `Context.load` builds a context from."""
    description, tensors = read(path)
    _check_model(path, description, vlm)
    try:
        check_description(description, len(tensors["input_ids"]), vlm)
        check_finite(tensors)
        fields = unpack(description, tensors, vlm)
        _check_shapes(fields)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise InputError(f"{path}: its parts do not fit together ({first_line(error)}); make it again") from None
    if not images:
        return fields
    pictures = vlm.prompts.load(images)
    sizes = [image.size for image in fields["layout"].images]
    if [picture.size for picture in pictures] != sizes:
        raise InputError(f"{path} was made of other images: their sizes are {sizes}")
    return {**fields, "images": tuple(pictures)}


def pack(fields: Fields, storage: str) -> tuple[dict[str, Tensor], dict[str, str], dict[str, float]]:
    """Return a context as the tensors and the metadata of a file, and the errors that int8 makes.

    The heads that other processes hold are gathered, so the file is that of the whole model.

    The errors are the relative errors (root mean square) of keys and values; with "full" there are none.
    """
    tensors = {"positions": fields["positions"].int(), "input_ids": fields["input_ids"].int()}
    state = fields.get("state") or {}
    tensors |= {f"state.{name}": tensor.contiguous().cpu() for name, tensor in tensors_of(state).items()}
    errors: dict[str, float] = {}
    split = fields["vlm"].text.split
    for name, over in (("keys", 2), ("values", 3)):
        tensor = fields[name] if split is None else split.gather(fields[name], 1, split.kv_heads)
        if storage == "full":
            tensors[name] = tensor.contiguous().cpu()
            continue
        whole, scale = _to_int8(tensor, over)
        errors[name] = _relative_error(whole.float() * scale, tensor.float())
        tensors[name], tensors[f"{name}_scale"] = whole.cpu(), scale.cpu()
    text = json.dumps(_describe(fields, storage, errors), sort_keys=True)
    metadata = {"format": "pt", "mllm_fast.context": text, "mllm_fast.checksum": checksum(text, tensors)}
    return tensors, metadata, errors


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the description and the tensors of a file, after checking its checksum.

    Raises:
        InputError: the file is missing, not a context, of a newer format, cut off or changed.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return parse(path, metadata, tensors)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: no context file, or one that was cut off ({first_line(error)})") from None


def read_origin(path: str | os.PathLike[str]) -> tuple[str, str | None]:
    """Return what a file says of the model that it was made with, without reading its tensors.

    Returns:
        Its name, which can be loaded: "shapes", a folder that exists, or a hub id. And its dtype.

    Raises:
        InputError: The file is no context, it does not name its model, or it names a folder that is not there.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("mllm_fast.context")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: no context file, or one that was cut off ({first_line(error)})") from None
    if text is None:
        raise InputError(f"{path}: a safetensors file, but no context; mllm-fast compress makes one")
    try:
        description = json.loads(text)
        name, dtype = description["model"].get("id"), description.get("dtype")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(f"{path}: its description cannot be read; make it again") from None
    if not isinstance(name, str) or not name:
        raise InputError(f"{path}: does not name the model that it was made with; give it with --model")
    if Path(name).parts[-3:] == SHAPES_WEIGHTS.parts[-3:]:  # of an earlier release, in whichever place it was installed
        name = EMBEDDED
    if (name.startswith((".", "~")) or Path(name).is_absolute()) and not Path(name).is_dir():
        raise InputError(f"{path}: was made with the model {name}, which is not there; give its folder with --model")
    _log.info("%s was made with the model %s in %s", path, name, dtype)
    return name, dtype if isinstance(dtype, str) else None


def parse(path: Any, metadata: dict[str, str], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the description and copies of the tensors, given a file's content; see `read`.

    The tensors are copied because they may lie in a memory-mapped file.
    """
    text = metadata.get("mllm_fast.context")
    if text is None:
        raise InputError(f"{path}: a safetensors file, but no context; mllm-fast compress makes one")
    copies: dict[str, Tensor] = {}
    if metadata.get("mllm_fast.checksum") != checksum(text, tensors, copies):
        raise InputError(f"{path}: the file was damaged or edited (its checksum does not fit); make it again")
    try:
        description = json.loads(text)
        version = int(description["version"])
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InputError(f"{path}: its description cannot be read; make it again") from None
    if version > VERSION:
        raise InputError(f"{path}: format {version}, this mllm-fast reads up to {VERSION}; update mllm-fast")
    return description, copies


def unpack(description: dict[str, Any], tensors: dict[str, Tensor], vlm: ModelRunner) -> Fields:
    """Return the fields of a context, given the content of a file."""
    device, dtype = home_of(vlm.model), vlm.model.dtype
    if description["storage"] == "int8":
        keys, values = (tensors[n].float().mul_(tensors[f"{n}_scale"]).to(dtype) for n in ("keys", "values"))
    else:
        keys, values = tensors["keys"], tensors["values"]
    if vlm.text.split is not None:
        mine = vlm.text.split.kv_heads[vlm.text.split.rank]
        keys, values = (one[:, mine.start : mine.stop].contiguous() for one in (keys, values))
    input_ids = tensors["input_ids"].long()
    held = {name.removeprefix("state."): one.to(device) for name, one in tensors.items() if name.startswith("state.")}
    return {
        "vlm": vlm,
        "keys": keys.to(device),
        "values": values.to(device),
        "positions": tensors["positions"].long(),
        "layout": TokenLayout(
            len(input_ids),
            len(input_ids),
            images_of(description["images"]),
            torch.tensor(description.get("separators", []), dtype=torch.long),
            torch.tensor(description.get("timestamps", []), dtype=torch.long),
        ),
        "input_ids": input_ids,
        "state": state_from(description["state"], held, vlm.text) if held else None,
        "first_token": description.get("first_token"),
        **{name: description[name] for name in ("position", "prompt", "description", "settings")},
    }


def checksum(text: str, tensors: dict[str, Tensor], copies: dict[str, Tensor] | None = None) -> str:
    """Return a SHA-256 checksum of a description and its tensors, in hexadecimal.

    The hash covers the text, the names, types and shapes of the tensors, and sums of their bytes. The bytes are read as
    64-bit words in rows of 512. They are summed by row and, 256 rows at a time, by column. This runs at the speed of
    memory, and a change in one place always changes a sum.

    Args:
        text: the description.
        tensors: the tensors by name.
        copies: if given, receives a copy of each tensor; the sums are then those of the copies.
    """
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if copies is not None:
            copies[name] = torch.empty_like(tensor)
        raw = tensor.reshape(-1).view(torch.uint8)
        for begin in range(0, len(raw), _PART):
            part = raw[begin : begin + _PART]
            if copies is not None:
                part = copies[name].reshape(-1).view(torch.uint8)[begin : begin + _PART].copy_(part)
            even = len(part) // _ROW * _ROW
            words = part[:even].view(torch.int64).reshape(-1, _ROW // 8)
            for sums in (words.sum(0), words.sum(1), part[even:]):
                digest.update(sums.numpy().data)
    return digest.hexdigest()


def _describe(fields: Fields, storage: str, errors: dict[str, float]) -> dict[str, Any]:
    config = fields["vlm"].model.config
    return {
        "version": VERSION,
        "model": {
            "type": config.model_type,
            "id": model_name(fields["vlm"].model),
            "revision": getattr(config, "_commit_hash", None),
            "fingerprint": fingerprint(fields["vlm"].model),
        },
        "versions": versions(),
        "date": now(),
        "dtype": str(fields["keys"].dtype).removeprefix("torch."),
        "storage": storage,
        "storage_error": errors,
        "images": plain_images(fields["layout"].images),
        "separators": fields["layout"].separators.tolist(),
        "timestamps": fields["layout"].timestamps.tolist(),
        "state": plain_of(fields.get("state") or {}),
        "first_token": fields.get("first_token"),
        **{name: fields[name] for name in ("position", "prompt", "description", "settings")},
    }


def _check_model(path: Any, description: dict[str, Any], vlm: ModelRunner) -> None:
    made, config = description.get("model"), vlm.model.config
    if not isinstance(made, dict) or made.get("fingerprint") != fingerprint(vlm.model):
        here = model_name(vlm.model) or config.model_type
        made = made if isinstance(made, dict) else {}
        dtype = str(vlm.model.dtype).removeprefix("torch.")
        raise InputError(
            f"{path}: made with another model, {made.get('id') or made.get('type')} in {description.get('dtype')}"
            f" (fingerprint {str(made.get('fingerprint'))[:12]}), or another version of transformers; not with {here}"
            f" in {dtype} ({fingerprint(vlm.model)[:12]}): load that one, or make the context again"
        )


def _check_shapes(fields: Fields) -> None:
    """Raise ValueError or TypeError if the parts of a context do not fit each other or the model."""
    model: ModelRunner = fields["vlm"]
    text, length, positions = model.text, len(fields["input_ids"]), fields["positions"]
    for name, sizes in (
        ("keys", [(site.num_kv_heads, site.key_dim) for site in text.sites]),
        ("values", [(site.num_kv_heads, site.head_dim) for site in text.sites]),
    ):
        heads, width = sizes[0] if len(set(sizes)) == 1 else (1, max(heads * width for heads, width in sizes))
        tensor, shape = fields[name], (len(text.sites), heads, positions.shape[-1], width)
        if tuple(tensor.shape) != shape or tensor.dtype != model.model.dtype:
            raise ValueError(f"{name} is {model.model.dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
    steps = positions.diff(dim=1)
    if positions.shape[:-1] != shape[:1] or not shape[2] or bool((steps < 1).any()):
        raise ValueError("positions ascend in each layer")
    if int(positions.min()) < 0 or int(positions.max()) >= length:
        raise ValueError(f"positions are 0 to {length - 1}")
    if int(fields["input_ids"].min()) < 0 or int(fields["input_ids"].max()) >= text.head.out_features:
        raise ValueError("input_ids lie outside the vocabulary")
    for image in fields["layout"].images:
        count = sum(tile.rows * tile.cols for tile in image.tiles) or len(image.positions)
        if count != len(image.positions) or not 0 <= int(image.positions.min()) <= int(image.positions.max()) < length:
            raise ValueError("an image's tiles and positions disagree")
    if bool(fields["state"]) != bool(text.findings.others):
        raise ValueError("the state of layers without attention is there if the model has such layers")


def _to_int8(tensor: Tensor, over: int) -> tuple[Tensor, Tensor]:
    """Return a tensor as int8 numbers and their scale.

    The scale is the largest absolute value over the dimension `over`, divided by 127. Keys have one scale per channel
    (over tokens) and values one per token (over channels), since this is how they vary (KIVI, arXiv 2402.02750).
    """
    wide = tensor.float()
    scale = wide.abs().amax(over, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (wide / scale).round().to(torch.int8), scale


def _relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float32).tiny))
