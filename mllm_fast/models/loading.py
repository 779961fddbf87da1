"""Loading of a model and its processor: the embedded one, a folder, or a hub id.

Each failure is reported in one line.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..core.assets import SHAPES_WEIGHTS
from ..core.errors import InputError, first_line
from .architectures import check_vision

EMBEDDED = "shapes"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def parse_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Return a torch dtype; the default is float32 on the CPU and bfloat16 elsewhere."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise InputError(f"dtype is one of {', '.join(_DTYPES)}, got {dtype!r}")
    return _DTYPES[dtype]


def parse_device(device: str | torch.device | None) -> torch.device:
    """Return a torch device that exists; the default is the first GPU, or else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        parsed = torch.device(device)
    except RuntimeError:
        raise InputError(f"device is 'cpu', 'cuda', 'cuda:N' or 'auto', got {device!r}") from None
    if parsed.type == "cuda":
        count = torch.cuda.device_count()
        if (parsed.index or 0) >= count:
            raise InputError(f"device {device!r} is not there: torch sees {count} GPUs; use --device cpu")
    elif parsed.type == "meta":
        raise InputError("device 'meta' holds no values; use 'cpu' or 'cuda'")
    return parsed


def model_folder(name: str) -> str:
    """Return the folder of the embedded model for its name, and any other name unchanged ("./shapes" is a folder)."""
    if name == EMBEDDED:
        return str(SHAPES_WEIGHTS)
    return name


def load_pretrained(
    name: str, device: torch.device, dtype: torch.dtype, adapted: bool = False, **options: Any
) -> tuple[Any, Any]:
    """Load a model and its processor through transformers' Auto classes.

    Args:
        name: "shapes" (the embedded model), a folder, or a hub id.
        device: The device of the model, unless `options` has a `device_map`.
        dtype: The dtype of the weights.
        adapted: Whether the caller has an adapter for the model.
        options: Further arguments of transformers' `from_pretrained`.

    Returns:
        The model, in evaluation mode, and the processor.

    Raises:
        InputError: A file of the folder is missing or damaged, the model is text-only, or the architecture is unknown.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig

    source = model_folder(name)
    _check_folder(name, Path(source))
    with failures(name), quiet():
        settings, _ = PreTrainedConfig.get_config_dict(source, **_hub_options(options))
    if not isinstance(settings, dict) or not isinstance(settings.get("model_type"), str):
        raise InputError(f"{name}: config.json does not describe a model; copy it again")
    if not adapted:
        with _named(name):
            check_vision(settings["model_type"], "vision_config" in settings or "text_config" in settings)
    if "device_map" in options and find_spec("accelerate") is None:
        raise InputError("a model spread over devices needs accelerate: pip install 'mllm-fast[offload]'")
    with failures(name), quiet():
        config = AutoConfig.from_pretrained(source, **_hub_options(options))
        processor = processor_class(config).from_pretrained(source, **_hub_options(options))
        loader: Any = AutoModelForImageTextToText
        model, report = loader.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(f"{name}: the weights lack {len(missing)} tensors, {missing[0]} among them; copy them again")
    if "device_map" not in options:
        with failures(name):
            model = model.to(device)
    return model.eval(), processor


def processor_class(config: Any) -> Any:
    """Return the class that loads a model's processor, restricted to its image side.

    Without torchvision transformers cannot build video processors. With it, transformers asks for files that an image
    model need not have.
    """
    from transformers import AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    if type(config) not in PROCESSOR_MAPPING:
        return AutoProcessor
    found: Any = PROCESSOR_MAPPING[type(config)]
    return image_side(found)


def image_side(cls: type) -> type:
    """Return a processor class without its video processor, under the same name, or the class itself if it has none."""
    from transformers import ProcessorMixin

    every: list[str] = list(cls.get_attributes())  # type: ignore[attr-defined]
    if "video_processor" not in every:
        return cls
    place = every.index("video_processor")

    class ImageSide(ProcessorMixin):
        """Stands between the class and its base, and leaves the video processor out of what the base is given."""

        def __init__(self, *args: Any, **options: Any):
            options.pop("video_processor", None)
            super().__init__(*args[:place], *args[place + (len(args) == len(every)) :], **options)

    names = [name for name in every if name != "video_processor"]
    return type(cls.__name__, (cls, ImageSide), {"get_attributes": classmethod(lambda _: names)})


def _hub_options(options: dict[str, Any]) -> dict[str, Any]:
    return {k: options[k] for k in ("revision", "token", "cache_dir", "local_files_only") if k in options}


def _check_folder(name: str, folder: Path) -> None:
    if not folder.is_dir():
        if folder.is_file() or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise InputError(f"{name}: no such model folder; give a folder, a hub id or '{EMBEDDED}'")
        return
    if not (folder / "config.json").is_file():
        raise InputError(f"{name}: the folder has no config.json; give a folder that save_pretrained wrote")
    with failures(f"{name}: config.json"):  # some versions of transformers do not name the file
        if not isinstance(json.loads((folder / "config.json").read_bytes()), dict):
            raise InputError(f"{name}: config.json does not describe a model; copy it again")
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{name}: the folder has no weights (*.safetensors); copy the model again")
    if not any((folder / f).is_file() for f in ("processor_config.json", "preprocessor_config.json")):
        raise InputError(f"{name}: the folder has no processor_config.json; save the processor beside the model")
    if not any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise InputError(f"{name}: the folder has no tokenizer (tokenizer.json); save the processor beside the model")


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Prefix every InputError inside the block with the name of the model."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


@contextlib.contextmanager
def failures(name: str) -> Iterator[None]:
    """Turn transformers' many exceptions for a model that cannot be loaded into an InputError of one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a damaged file can make the libraries raise anything
        raise InputError(f"{name}: the model cannot be loaded: {first_line(error)}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and messages of the libraries inside the block.

    Stdout and stderr belong to the caller.
    """
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
