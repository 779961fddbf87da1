"""Low-rank adapters (LoRA, arXiv 2106.09685) in a language model's attention, to add, remove or merge."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..core.errors import InputError
from ..core.extras import install_command
from ..models.loading import failures
from ..vlm import VLM
from .weights_id import weights_name


def merged(vlm: VLM, folder: Path, base: str | None) -> VLM:
    """Return a language model with adapters merged into its weights.

    Args:
        vlm: The language model. It must not be used afterwards, because its weights are changed.
        folder: The folder of the adapters.
        base: The fingerprint of the weights that the adapters were trained on, or None to skip the check.

    Raises:
        InputError: If peft is not installed, or if the adapters belong to another model.
    """
    peft = _peft()
    if base is not None and base != weights_name(vlm.model):
        raise InputError(
            f"{folder}: the adapters were trained on another language model (weights {base[:12]}); load that one"
        )
    with failures(str(folder)), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.PeftModel.from_pretrained(vlm.model, str(folder)).merge_and_unload()
    return VLM(model.eval(), vlm.processor, max_pixels=vlm.prompts.max_pixels, backend=vlm.backend)


@contextmanager
def adapted_model(vlm: VLM, rank: int, seed: int) -> Iterator[Any]:
    """Context manager that adds adapters to the attention of the text part and removes them on exit.

    Args:
        vlm: The language model.
        rank: The rank of the adapters.
        seed: The seed of their weights.

    Raises:
        InputError: If peft is not installed.
    """
    peft = _peft()
    names = {id(module): name for name, module in vlm.model.named_modules()}
    attention = [names[id(module)] for module in vlm.text.attention]
    targets = [f"{module}.{part}" for module in attention for part in ("q_proj", "v_proj", "o_proj")]
    before = {name: p.requires_grad for name, p in vlm.model.named_parameters()}
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses names that transformers has changed
        adapted = peft.get_peft_model(vlm.model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    try:
        yield adapted
    finally:
        adapted.unload()
        for name, parameter in vlm.model.named_parameters():
            parameter.requires_grad_(before[name])


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise InputError(f"fine-tuning needs peft: {install_command('joint')}") from None
    return peft
