"""Changes of the vision embedding that show a detector one thing in place of another (arXiv 2405.14612, section 6)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..core.errors import InputError, check_choice
from .detector import Detector, Vision

WAYS = ("step", "pgd")
STEPS = 5  # many find changes that turn the detector and mean nothing


@torch.inference_mode(False)
def toward(
    owl: Detector,
    vision: Vision,
    lower: Tensor,
    higher: Tensor,
    size: float,
    way: str = "step",
    steps: int = STEPS,
) -> Tensor:
    """E changed so that the embedded queries `lower` [., d_text] lose and `higher` gain: [1 + n, d].

    The loss is the detector's own, of class logits alone: the cross-entropy of seeing the i-th of `higher` and not the
    i-th of `lower`, at each box and for each i by how far the box shows the i-th of `lower` in the image as it is
    (its score). Where they are not as many, all of `higher` stand for each of `lower`.

    Args:
        size: L2 norm of the change, in shares of E's own.
        way: "step", one step along the gradient's signs; "pgd", `steps` steps along the gradient, kept within the norm.
    """
    check_choice("way", way, WAYS)
    if not size > 0:
        raise InputError(f"the size of a change is above 0, in shares of the embedding's norm, got {size}")
    if steps < 1:
        raise InputError(f"steps is at least 1, got {steps}")
    tokens = vision.tokens.detach().clone()
    queries, few = torch.cat([lower, higher]).clone(), len(lower)
    radius = size * float(tokens.norm())
    with torch.no_grad():
        shown = owl.logits(owl.features(tokens), queries[:few]).sigmoid()
    paired = len(lower) == len(higher)
    weights = shown / shown.sum().clamp_min(torch.finfo(shown.dtype).tiny)

    def gradient(change: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = (tokens + change).requires_grad_()
            logits = owl.logits(owl.features(leaf), queries)
            risen = logsigmoid(logits[:, few:])
            gain = (risen if paired else risen.mean(-1, keepdim=True)) + logsigmoid(-logits[:, :few])
            return torch.autograd.grad((weights * gain).sum(), leaf)[0]

    change = torch.zeros_like(tokens)
    if way == "step":
        return tokens + _of_norm(gradient(change).sign(), radius)
    for _ in range(steps):
        change = change + _of_norm(gradient(change), 2 * radius / steps)
        if float(change.norm()) > radius:
            change = _of_norm(change, radius)
    return tokens + change


def at_random(vision: Vision, size: float, seed: int) -> Tensor:
    """E changed by random signs, of the norm that `toward` gives."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, vision.tokens.shape, generator=generator).to(vision.tokens) * 2 - 1
    return vision.tokens + _of_norm(signs, size * float(vision.tokens.norm()))


def _of_norm(change: Tensor, norm: float) -> Tensor:
    return change * (norm / change.norm().clamp_min(torch.finfo(change.dtype).tiny))
