"""What the builders of tiny random models share: sizes, tokenizers, weights, and stand-ins for processors.

Processors are transformers' own where they can be built without torchvision. The others are `Stand` objects, which make
the inputs in the same form.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import tiny
import torch
from transformers import BatchFeature

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
HALVES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SQUARE = {"height": 32, "width": 32}
PINPOINTS = [[32, 64], [64, 32], [64, 64]]
SLIDING = ["sliding_attention", "full_attention"] * 2
BUILD: dict[str, Callable[[], tuple[Any, Any]]] = {}


def family(build: Callable[[], tuple[Any, Any]]) -> Callable[[], tuple[Any, Any]]:
    BUILD[build.__name__] = build
    return build


def images(module: str, name: str) -> Any:
    """An image processor of transformers that works on PIL images alone."""
    return getattr(import_module(f"transformers.models.{module}.image_processing_pil_{module}"), name)


def build(name: str) -> tuple[Any, Any]:
    """A family's model and processor; the test is skipped if this release of transformers does not know it."""
    try:
        return BUILD[name]()
    except AttributeError as error:
        if "module transformers has no attribute" not in str(error):
            raise
        pytest.skip(str(error))


def text(vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def words(*special: str, **named: str) -> tuple[Any, Callable[[str], int]]:
    tokenizer = tiny.tokenizer(list(special), **named)
    return tokenizer, tokenizer.convert_tokens_to_ids


def template(image: str) -> str:
    return tiny._TEMPLATE.replace("IMAGE", image)


def finish(model: torch.nn.Module, seed: int = 0) -> Any:
    """Weights large enough that attention and logits are far from uniform; gains and biases not 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            owner, _, kind = name.rpartition(".")
            if p.ndim > 1:
                p.copy_(noise * (0.3 if p.ndim > 3 else 1.5 / p.shape[-1] ** 0.5))
            elif "norm" in owner and kind == "weight":
                p.copy_(gain(model.get_submodule(owner), p.shape[0]) + 0.2 * noise)
            else:
                p.copy_(0.2 * noise)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped one has no float64
    return model.eval()


def gain(norm: torch.nn.Module, width: int) -> float:
    """1 for a norm that multiplies by its weight, 0 for one that adds 1 to it."""
    weight = norm.weight
    weight.zero_()
    try:
        return float(not norm(torch.linspace(-1, 1, width, dtype=weight.dtype)[None]).any())
    except (TypeError, AttributeError):  # a gated norm, which takes a second argument
        return 1.0


class Stand:
    """A processor in the place of one that needs torchvision.

    Args:
        tokenizer: The tokenizer.
        read: From images to the model's inputs, and the text that stands for each image.
        mark: The placeholder in the template.
        kinds: The name of an input that marks image tokens with 1, or "".
    """

    def __init__(self, tokenizer: Any, image: str, read: Callable[[list], tuple[dict, list[str]]], kinds: str = ""):
        self.tokenizer, self.read, self.kinds = tokenizer, read, kinds
        self.image_token = image
        self.image_token_id = tokenizer.convert_tokens_to_ids(image)
        self.chat_template = template("IMAGE")

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool = True, **_: Any) -> str:
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def __call__(self, images: Any = None, text: Any = None, **options: Any) -> BatchFeature:
        texts, found = text if isinstance(text, list) else [text], {}
        if images is not None:
            flat = [one for each in (images if isinstance(text, list) else [images]) for one in each]
            found, spelled = self.read(flat)
            marks = iter(spelled)
            texts = ["".join(next(marks) if p == "IMAGE" else p for p in _split(one)) for one in texts]
        several = len(texts) > 1
        ids = self.tokenizer(texts, return_tensors="pt", padding=several, padding_side="left")
        found = {"input_ids": ids.input_ids, "attention_mask": ids.attention_mask, **found}
        if self.kinds:
            found[self.kinds] = (ids.input_ids == self.image_token_id).long()
        return BatchFeature(found)


def _split(line: str) -> list[str]:
    parts = line.split("IMAGE")
    return [piece for i, part in enumerate(parts) for piece in ((part, "IMAGE") if i + 1 < len(parts) else (part,))]


def pixels(pictures: list, side: int = 32) -> torch.Tensor:
    read = images("clip", "CLIPImageProcessorPil")(
        size={"height": side, "width": side}, crop_size={"height": side, "width": side}, **HALVES
    )
    return read(pictures, return_tensors="pt")["pixel_values"]


def patches(pictures: list, side: int = 32, patch: int = 8) -> torch.Tensor:
    """[images, patches, channels, patch, patch] in row-major order."""
    cut = pixels(pictures, side).unfold(2, patch, patch).unfold(3, patch, patch)
    return cut.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


def repeated(token: str, count: int) -> str:
    return " ".join([token] * count)
