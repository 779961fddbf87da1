"""The registry of known architectures, by the model type in config.json."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..core.errors import InputError
from ..core.registry import Registry
from .adapter import Adapter

ARCHITECTURES: Registry[Adapter] = Registry(
    "architecture",
    "mllm_fast.architectures",
    {name: f"mllm_fast.models.{name}" for name in ("llava", "internvl", "qwen2_5_vl")},
)


def architecture(adapter: type[Adapter]) -> type[Adapter]:
    """Register an `Adapter` under its `model_type`; use it as a class decorator.

    An installed package registers an adapter by an entry point of the group "mllm_fast.architectures". The name of the
    entry point is the model type.
    """
    if not adapter.text_types:
        raise InputError(f"{adapter.__name__}.text_types names the language models it may hold; it is empty")
    ARCHITECTURES.register(adapter.model_type, adapter(), adapter.__module__)
    return adapter


def adapter_for(model_type: str, has_vision: bool) -> Adapter:
    """Return the adapter of a model type.

    Args:
        model_type: The model type in config.json.
        has_vision: Whether the model's config has a vision part. It only affects the error message.

    Raises:
        InputError: The architecture is not known.
    """
    if model_type not in ARCHITECTURES:
        hint = "" if has_vision else " (it has no vision part: a text-only model?)"
        raise InputError(
            f"the architecture {model_type!r} is not supported{hint}; supported are {', '.join(ARCHITECTURES)};"
            " to add one, see docs/extending.md, 'An architecture'"
        )
    return ARCHITECTURES.get(model_type)


def find_adapter(model: nn.Module) -> Adapter:
    """Return the adapter of a model.

    Raises:
        InputError: The architecture, or the language model inside it, is not known.
    """
    config: Any = model.config
    kind = getattr(config, "model_type", type(model).__name__)
    adapter = adapter_for(kind, hasattr(config, "vision_config"))
    text = config.get_text_config().model_type
    if text not in adapter.text_types:
        raise InputError(
            f"{kind} with a language model of type {text!r} is not supported; supported are"
            f" {', '.join(adapter.text_types)}; to add one, see docs/extending.md, 'An architecture'"
        )
    return adapter
