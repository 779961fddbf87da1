"""What a result was made with: the model, the machine's parts that matter to numbers, the versions and the date."""

from __future__ import annotations

import json
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..core.assets import CLIPS_WEIGHTS, EMBEDDED, EMBEDDED_VIDEO, SHAPES_WEIGHTS
from .fingerprint import fingerprint
from .offload import device_of

_PACKAGES = ("mllm-fast", "torch", "transformers", "triton")


def model_name(model: Any) -> str:
    """Return the name by which a model can be loaded from anywhere.

    It is "shapes" for the embedded one, a whole path for a folder, and "" for one that was not loaded by name.
    """
    name = str(getattr(model.config, "_name_or_path", "") or "")
    for folder, embedded in ((SHAPES_WEIGHTS, EMBEDDED), (CLIPS_WEIGHTS, EMBEDDED_VIDEO)):
        if name and Path(name) == folder:
            return embedded
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def now() -> str:
    """Return the time of day and the date in UTC, to the second, such as "2026-01-31T12:00:00+00:00"."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that numbers depend on; those that are not installed lack."""
    found = {"python": sys.version.split()[0]}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def made_with(model: Any) -> dict[str, Any]:
    """Return what a model is and where it runs, ready for JSON.

    Args:
        model: The model, loaded with transformers.
    """
    device = device_of(model)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {
        "model": model_name(model),
        "revision": getattr(model.config, "_commit_hash", None),
        "type": type(model).__name__,
        "fingerprint": fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": name,
        "versions": versions(),
    }


def as_text(provenance: dict[str, Any]) -> str:
    """Return a provenance as one line of text."""
    parts = []
    for name, value in provenance.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {one}" for key, one in value.items())
        if value not in (None, ""):
            parts.append(f"{name} {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
    return "; ".join(parts)
