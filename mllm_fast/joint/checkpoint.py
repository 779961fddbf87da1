"""The folder of a joint model, with the names of its parts, its alignment and its adapters."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..core.assets import SHAPES_JOINT
from ..core.errors import InputError, check_choice
from ..core.files import write_whole
from ..models.loading import EMBEDDED
from .whole_image import CROP, VIEWS

SETTINGS, WEIGHTS = "joint.json", "alignment.safetensors"
FORWARD, REVERSE = "detector-to-model", "model-to-detector"
DIRECTIONS = (FORWARD, REVERSE)  # the joint model of the paper, and the opposite direction, see `ReverseJoint`
_FORMAT = 1


def joint_folder(name: str | os.PathLike[str]) -> Path:
    """Return the folder of a joint model; "shapes" stands for the embedded one."""
    return SHAPES_JOINT if str(name) == EMBEDDED else Path(name)


def part_names(folder: Path) -> tuple[str, str]:
    """Return the detector and the language model of the joint model in a folder.

    Each is a folder inside it, a folder elsewhere, or a hub id.
    """
    settings = read_settings(folder)
    inside = lambda part: str(folder / part) if (folder / part).is_dir() else part  # noqa: E731
    return detector_name(inside(settings["detector"])), inside(settings["model"])


def detector_name(name: str) -> str:
    """Return the folder or hub id of a detector; "shapes" stands for the embedded one."""
    return str(SHAPES_JOINT / "detector") if name == EMBEDDED else name


def read_settings(folder: Path) -> dict[str, Any]:
    """Read the names of a joint model's parts: "detector", "model" and, if there are adapters, "lora".

    "view" says which part of an image the language model sees, "whole" or "crop" (its processor's own); folders of
    earlier releases do not say, which means "crop". "direction" says what is mapped to what, see `DIRECTIONS`.

    Raises:
        InputError: If the folder does not exist or holds no joint model that this release can read.
    """
    path = folder / SETTINGS
    if not path.is_file():
        raise InputError(f"{folder}: holds no joint model ({SETTINGS}); give one that `mllm-fast joint train` wrote")
    try:
        found = json.loads(path.read_text())
        if found["format"] != _FORMAT:
            raise InputError(f"{path}: of format {found['format']}, this release reads {_FORMAT}; update mllm-fast")
        check_choice("view", found.get("view", CROP), VIEWS)
        names = {name: str(found[name]) for name in ("detector", "model", "lora") if name in found or name != "lora"}
        check_choice("direction", found.get("direction", FORWARD), DIRECTIONS)
        return names | {"view": found.get("view", CROP), "direction": found.get("direction", FORWARD)}
    except InputError:
        raise
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: does not name a detector and a model; copy it again") from None


def write_settings(
    folder: Path, detector: str, model: str, view: str, lora: str | None = None, direction: str = FORWARD
) -> None:
    """Write the names of a joint model's parts, and what of an image it sees, to its folder, beside its alignment."""
    parts = {"format": _FORMAT, "detector": detector, "model": model, "view": view, "direction": direction}
    parts |= {} if lora is None else {"lora": lora}
    write_whole(folder / SETTINGS, (json.dumps(parts, indent=1) + "\n").encode())
