"""Parts shared by the training scripts of the embedded models: optimiser, learning rate and heads for patches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .batches import IGNORE, PatchTargets
from .scenes import COLORS, SHAPES


class PatchHeads(nn.Module):
    """Heads that read a patch's shape, colour and object centre; they are discarded after training."""

    def __init__(self, width: int):
        super().__init__()
        self.shape = nn.Linear(width, len(SHAPES) + 1)
        self.color = nn.Linear(width, len(COLORS) + 1)
        self.offset = nn.Linear(width, 2)

    def loss(self, hidden: torch.Tensor, targets: PatchTargets) -> torch.Tensor:
        hidden = hidden.float()
        inside = ~targets.offset[..., 0].isnan()
        return (
            classify(self.shape(hidden), targets.shape)
            + classify(self.color(hidden), targets.color)
            + 2 * F.smooth_l1_loss(self.offset(hidden)[inside], targets.offset[inside])
        )


def classify(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORE)


def adamw(modules: list[nn.Module], rate: float, decay: float) -> torch.optim.AdamW:
    parameters = {id(p): p for module in modules for p in module.parameters()}.values()
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def cosine(step: int, steps: int, warm_up: int) -> float:
    ramp = min(1.0, (step + 1) / warm_up)
    return ramp * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE)


def vision_layers(vision: Any) -> Iterable[nn.Module]:
    return getattr(vision, "vision_model", vision).encoder.layers  # older releases of transformers have one more module
