"""Loading of a model and its processor: the embedded one, a folder, or a hub id.

Each failure is reported in one line.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..core.assets import CLIPS_WEIGHTS, EMBEDDED, EMBEDDED_VIDEO, SHAPES_JOINT, SHAPES_WEIGHTS
from ..core.errors import InputError, first_line
from ..core.extras import install_command
from .architectures import ARCHITECTURES, check_vision
from .tensor_parallel import distribution, keep_own_keys

_log = logging.getLogger(__name__)
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
# what the checkpoints of some authors' own code are called once they are converted to transformers' classes
_CONVERTED = {
    "internvl_chat": "the same name with '-hf' behind it, such as OpenGVLab/InternVL3-8B-hf, or what"
    " `mllm-fast convert` makes of it",
    "llava_llama": "one of the organisation llava-hf, such as llava-hf/llava-1.5-7b-hf",
    "llava_mistral": "one of the organisation llava-hf, such as llava-hf/llava-v1.6-mistral-7b-hf",
    "llava_qwen": "one of the organisation llava-hf, such as llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "multi_modality": "one of the organisation deepseek-community, such as deepseek-community/Janus-Pro-7B",
}
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
    """Return the folder of an embedded model for its name, and any other name unchanged ("./shapes" is a folder)."""
    return str({EMBEDDED: SHAPES_WEIGHTS, EMBEDDED_VIDEO: CLIPS_WEIGHTS}.get(name, name))


def load_pretrained(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    adapted: bool = False,
    progress: bool | None = None,
    ranks: int = 0,
    **options: Any,
) -> tuple[Any, Any]:
    """Load a model and its processor through transformers' Auto classes.

    A folder of LoRA adapters alone loads the model that they were trained on, by the name in adapter_config.json, and
    adds the adapters to it.

    Args:
        name: "shapes" (the embedded model), a folder, or a hub id.
        device: The device of the model, unless `options` has a `device_map`.
        dtype: The dtype of the weights.
        adapted: Whether the caller has an adapter for the model.
        progress: Whether transformers' progress bars of the download and of the weights are shown on stderr. By default
            they are if a person sees it: in a terminal, an interactive Python or a notebook.
        ranks: The number of processes that the model is divided between, see `tensor_parallel`; 0 for one alone.
        options: Further arguments of transformers' `from_pretrained`.

    Returns:
        The model, in evaluation mode, and the processor.

    Raises:
        InputError: A file of the folder is missing or damaged, the model is text-only, or the architecture is unknown.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig

    source = model_folder(name)
    if (Path(source) / "adapter_config.json").is_file() and not (Path(source) / "config.json").is_file():
        if ranks:
            raise InputError(
                f"{name}: a model with adapters is not divided between processes; merge them into it first"
            )
        return _load_adapters(name, Path(source), device, dtype, adapted, progress, options)
    _check_folder(name, Path(source))
    started, bars = time.monotonic(), shows_bars(name, progress)
    with failures(name), quiet():
        settings, _ = PreTrainedConfig.get_config_dict(source, **_hub_options(options))
        options = {"trust_remote_code": False, **options}
    if not isinstance(settings, dict) or not isinstance(settings.get("model_type"), str):
        raise InputError(f"{name}: config.json does not describe a model; copy it again")
    if settings["model_type"] in _CONVERTED:
        raise InputError(
            f"{name}: the model type {settings['model_type']!r} is that of the authors' own code, which transformers"
            f" does not read; load the converted checkpoint, {_CONVERTED[settings['model_type']]}"
        )
    if not adapted:
        with _named(name):
            check_vision(settings["model_type"], "vision_config" in settings or "text_config" in settings)
    if "device_map" in options and find_spec("accelerate") is None:
        raise InputError(f"a model spread over devices needs accelerate: {install_command('offload')}")
    with failures(name), quiet(bars):
        config = AutoConfig.from_pretrained(source, **_hub_options(options))
        if ranks:
            quantised = options.get("quantization_config") is not None
            options = {**options, "distributed_config": distribution(config, ranks, quantised)}
        processor = _load_processor(config, source, options)
        loader: Any = AutoModelForImageTextToText
        model, report = loader.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(f"{name}: the weights lack {len(missing)} tensors, {missing[0]} among them; copy them again")
    if ranks:
        keep_own_keys(model, ranks)
    elif "device_map" not in options:
        with failures(name):
            model = model.to(device)
    place = f"{ranks} processes" if ranks else "several devices" if "device_map" in options else device
    kind, spent = settings["model_type"], time.monotonic() - started
    _log.info("loaded the model %s: %s, on %s in %s, in %.1f s", name, kind, place, model.dtype, spent)
    return model.eval(), processor


def _load_adapters(
    name: str,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    adapted: bool,
    progress: bool | None,
    options: dict[str, Any],
) -> tuple[Any, Any]:
    """Load the model that a folder of adapters names, and add the adapters to it."""
    if find_spec("peft") is None:
        raise InputError(f"{name} holds adapters without their model, which needs peft: pip install peft")
    with failures(f"{name}: adapter_config.json"):
        base = json.loads((folder / "adapter_config.json").read_bytes()).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(f"{name}: adapter_config.json names no base_model_name_or_path; write the base model there")
    if Path(base).is_dir() and not (Path(base) / "config.json").is_file():
        raise InputError(f"{name}: adapter_config.json names the base model {base}, which has no config.json")
    model, processor = load_pretrained(base, device, dtype, adapted, progress, **options)
    with failures(name), quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses names that transformers has changed
        model.load_adapter(str(folder))
        if any((folder / f).is_file() for f in _PROCESSOR_FILES):
            processor = processor_class(model.config).from_pretrained(str(folder))
    _log.info("added the adapters of %s", name)
    return model.eval(), processor


def shows_bars(name: str, progress: bool | None) -> bool:
    """Return whether the progress bars of the libraries are shown while a model or a detector is loaded.

    Args:
        name: Its name or folder. What is part of the package is loaded in a moment, without bars.
        progress: Whether the caller wants them; None shows them if a person sees stderr: in a terminal, an interactive
            Python or a notebook.
    """
    folders = {SHAPES_WEIGHTS, SHAPES_JOINT, CLIPS_WEIGHTS}
    embedded = name in (EMBEDDED, EMBEDDED_VIDEO) or folders & {Path(name), Path(name).parent}
    if embedded or progress is not None:
        return bool(progress and not embedded)
    return sys.stderr.isatty() or hasattr(sys, "ps1")


def _load_processor(config: Any, source: str, options: dict[str, Any]) -> Any:
    """Load a model's processor, with its video side if the model's videos are known and transformers can load it."""
    from transformers import AutoProcessor

    knows_videos = config.model_type in ARCHITECTURES and ARCHITECTURES.get(config.model_type).knows_videos
    if knows_videos and find_spec("torchvision") is not None:
        # torchvision may not fit torch, and a folder may hold the image side alone
        try:
            return AutoProcessor.from_pretrained(source, **_hub_options(options))
        except Exception as error:
            _log.warning("the model's video processor could not be loaded (%s); it reads images", first_line(error))
    return processor_class(config).from_pretrained(source, **_hub_options(options))


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
    """Return the options that all parts of a model are loaded with. Code of the folder runs only if it is asked for."""
    names = ("revision", "token", "cache_dir", "local_files_only")
    found = {name: options[name] for name in names if name in options}
    return found | {"trust_remote_code": bool(options.get("trust_remote_code", False))}


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
    if not any((folder / f).is_file() for f in _PROCESSOR_FILES):
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
def quiet(progress: bool = False) -> Iterator[None]:
    """Silence the messages of the libraries inside the block, and the progress bars unless `progress` is set.

    Stdout and stderr belong to the caller.
    """
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    if not progress:
        hf_logging.disable_progress_bar()
    try:
        with contextlib.nullcontext() if progress else contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
