"""Low-rank adapters (LoRA, arXiv 2106.09685) in a language model's attention: put in, taken out, merged."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..core.errors import InputError
from ..models.loading import failures
from ..vlm import VLM
from .weights_id import weights_name


def merged(vlm: VLM, folder: Path, base: str | None) -> VLM:
    """The language model with adapters merged into its weights; `vlm` is used up.

    Raises:
        InputError: peft is not there, or the adapters belong to another model.
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
    """Adapters in the attention of the text part, which are taken out again."""
    peft = _peft()
    names = {id(module): name for name, module in vlm.model.named_modules()}
    layers = [names[id(layer)] for layer in vlm.text.layers]
    targets = [f"{layer}.{vlm.adapter.attention}.{part}" for layer in layers for part in ("q_proj", "v_proj", "o_proj")]
    before = {name: p.requires_grad for name, p in vlm.model.named_parameters()}
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of names that transformers changed and peft still uses
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
        raise InputError("fine-tuning needs peft: pip install 'mllm-fast[joint]'") from None
    return peft
