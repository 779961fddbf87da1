"""Read W as the authors of arXiv 2405.14612 released it: PyTorch's state dictionaries.

Their deep MLP has three hidden layers with ReLU, and their copy of LLaVA's projector one with GELU. Neither normalizes
E. The files do not say which models W was trained between: the authors name google/owlvit-base-patch32 and
llava-hf/llava-1.5-7b-hf, of which both saw the whole image.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..core.errors import InputError, first_line
from .alignment import Alignment, AlignmentConfig

_DEEP = re.compile(r"(?:^|\.)(input_layer|hidden_layers\.(\d+)|output_layer)\.(weight|bias)$")
_PROJECTOR = re.compile(r"(?:^|\.)linear_([12])\.(weight|bias)$")


def read_released(path: str | os.PathLike[str]) -> Alignment:
    """Return W from a file of the authors, a .pth or .pt, or the same tensors as .safetensors.

    PyTorch's files are read as tensors alone, so nothing in them is run.

    Raises:
        InputError: The file does not exist, cannot be read, or does not hold the layers of a released W.
    """
    name = os.fspath(path)
    if not Path(name).is_file():
        raise InputError(f"{name}: there is no such file")
    try:
        if name.endswith(".safetensors"):
            tensors = load_file(name)
        else:
            tensors = torch.load(name, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise InputError(f"{name}: cannot be read as weights: {first_line(error)}") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise InputError(f"{name}: holds no weights by name")
    found = {key: match for key in tensors if (match := _DEEP.search(key))}
    if found:
        layers = {_deep_place(match, len(found) // 2): tensors[key] for key, match in found.items()}
    else:
        found = {key: match for key in tensors if (match := _PROJECTOR.search(key))}
        layers = {(int(match[1]) - 1, match[2]): tensors[key] for key, match in found.items()}
    if len(found) != len(tensors) or len(layers) < 4 or len(layers) % 2:
        raise InputError(
            f"{name}: is no released W, whose layers are input_layer, hidden_layers and output_layer, or linear_1 and"
            f" linear_2; it holds {', '.join(sorted(tensors)[:6])}"
        )
    return _alignment(name, layers)


def _deep_place(match: re.Match[str], layers: int) -> tuple[int, str]:
    if match[1] == "input_layer":
        return 0, match[3]
    return (layers - 1 if match[1] == "output_layer" else int(match[2]) + 1), match[3]


def _alignment(name: str, layers: dict[tuple[int, str], Tensor]) -> Alignment:
    """Return W with these layers, by their number and the name of the tensor."""
    count = len(layers) // 2
    try:
        weights = [layers[i, "weight"] for i in range(count)]
        config = AlignmentConfig(
            kind="mlp" if count > 2 else "projector",
            inputs=weights[0].shape[1],
            outputs=weights[-1].shape[0],
            hidden=weights[0].shape[0],
            depth=count - 1 if count > 2 else 2,
            norm=False,
            activation="relu" if count > 2 else "gelu",
        )
        alignment = Alignment(config, about={"released": Path(name).name})
        alignment.load_state_dict({f"body.{2 * i}.{part}": tensor.float() for (i, part), tensor in layers.items()})
    except (KeyError, IndexError, RuntimeError) as error:
        raise InputError(f"{name}: the layers of W do not fit each other: {first_line(error)}") from None
    return alignment.eval()
