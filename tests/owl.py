"""Tiny random detectors of the real classes, with a real processor, and the joint models made of them."""

from __future__ import annotations

import torch
from transformers import (
    Owlv2Config,
    Owlv2ForObjectDetection,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTProcessor,
)
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil
from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil

from mllm_fast.joint import Alignment, AlignmentConfig, Detector, JointModel
from mllm_fast.shapes.detector import TEXT_WINDOW, build_tokenizer

KINDS = {
    "owlvit": (OwlViTConfig, OwlViTForObjectDetection, OwlViTImageProcessorPil),
    "owlv2": (Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessorPil),
}


def detector(kind: str = "owlvit", seed: int = 0, heads: int = 3, layers: int = 2) -> Detector:
    """5 x 5 tokens of 30 numbers, in float64; gains and biases not 1 and 0."""
    configure, make, images = KINDS[kind]
    tokenizer = build_tokenizer()
    shared = {"num_hidden_layers": layers, "intermediate_size": 40}
    config = configure(
        text_config={
            **shared,
            "hidden_size": 24,
            "num_attention_heads": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": TEXT_WINDOW,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={**shared, "hidden_size": 30, "num_attention_heads": heads, "image_size": 40, "patch_size": 8},
        projection_dim=24,
    )
    model = make(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(
                noise / p.shape[-1] ** 0.5 if p.ndim >= 2 else ("norm" in name and "bias" not in name) + 0.2 * noise
            )
    processor = OwlViTProcessor(image_processor=images(size={"height": 40, "width": 40}), tokenizer=tokenizer)
    return Detector(model.double(), processor)


def joint(vlm, owl: Detector | None = None, kind: str = "mlp", seed: int = 0) -> JointModel:
    """With a W of random weights."""
    owl = owl or detector()
    torch.manual_seed(seed)
    config = AlignmentConfig(kind, owl.width, vlm.text.config.hidden_size, hidden=20, layers=1, heads=2)
    return JointModel(owl, Alignment(config).double(), vlm)
