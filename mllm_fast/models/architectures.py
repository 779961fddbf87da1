"""The registry of adapters, by the model type in config.json."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..core.errors import InputError
from ..core.registry import Registry
from .adapter import Adapter

_MODULES = {
    "llava": ("llava", "vipllava"),
    "llava_next": ("llava_next", "llava_next_video", "llava_onevision"),
    "pixtral": ("mistral3",),
    "internvl": ("internvl", "aya_vision", "cohere2_vision", "ovis2"),
    "idefics3": ("idefics3", "smolvlm"),
    "qwen2_vl": (
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "qwen3_vl_moe",
        "qwen3_5",
        "qwen3_5_moe",
        "glm4v",
        "glm4v_moe",
        "kimi_k25",
    ),
    "gemma": ("paligemma", "gemma3", "gemma4"),
    "lfm2_vl": ("lfm2_vl",),
    "molmo2": ("molmo2",),
    "perception_lm": ("perception_lm",),
}
ARCHITECTURES: Registry[Adapter] = Registry(
    "architecture",
    "mllm_fast.architectures",
    {name: f"mllm_fast.models.{module}" for module, names in _MODULES.items() for name in names},
)


def architecture(adapter: type[Adapter]) -> type[Adapter]:
    """Register an `Adapter` under its `model_types`; use it as a class decorator.

    An installed package registers an adapter by an entry point of the group "mllm_fast.architectures". The name of the
    entry point is the model type.
    """
    if not adapter.model_types:
        raise InputError(f"{adapter.__name__}.model_types names the model types that it is for; it is empty")
    for name in adapter.model_types:
        ARCHITECTURES.register(name, adapter(), adapter.__module__)
    return adapter


def find_adapter(model: nn.Module) -> Adapter:
    """Return the adapter of a model, or one that does not know how image tokens lie.

    Raises:
        InputError: The model has no vision part.
    """
    config: Any = model.config
    kind = getattr(config, "model_type", type(model).__name__)
    if kind in ARCHITECTURES:
        return ARCHITECTURES.get(kind)
    check_vision(kind, config.get_text_config() is not config)
    return Adapter()


def check_vision(kind: str, has_vision: bool) -> None:
    """Raise InputError for a model type without a vision part."""
    if not has_vision:
        raise InputError(
            f"the model type {kind!r} has no vision part: it is a text-only model; give a model that takes images"
        )
