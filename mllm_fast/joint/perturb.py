"""Perturb the vision embedding so that a detector sees one thing for another (arXiv 2405.14612, section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..core.errors import InputError, check_choice
from .detector import Detector, Vision

WAYS = ("step", "pgd")
STEPS = 5  # with many steps, the change fools the detector but means nothing


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
    """Change E so that the queries `lower` lose score and the queries `higher` gain score.

    The loss is the detector's own, from the class logits alone. It is the cross-entropy of seeing the i-th query of
    `higher` and not the i-th of `lower`. Each box and each i is weighted by the score of the i-th query of `lower` at
    that box in the unchanged image. If the two lists differ in length, the mean over all of `higher` is used for each
    of `lower`.

    Args:
        owl: The detector.
        vision: The detector's view of the image.
        lower: Embedded queries, [., d_text].
        higher: Embedded queries, [., d_text].
        size: The L2 norm of the change, as a share of the norm of E.
        way: "step" takes one step along the signs of the gradient. "pgd" takes `steps` steps along the gradient and
            keeps the change within the norm.
        steps: The number of steps of "pgd".

    Returns:
        The changed E, [1 + n, d].

    Raises:
        InputError: If `size` is not above 0, if `steps` is below 1, or if there is no such way.
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


@torch.inference_mode(False)
def signed_step(owl: Detector, vision: Vision, lower: Tensor, higher: Tensor, eps: float = 1.0) -> Tensor:
    """Change E by one step of equal size in every number, as in the released scripts of arXiv 2405.14612.

    Their loss is the squared distance of the logits of all boxes from targets far below (`lower`) and far above
    (`higher`) every logit. So far away, its gradient is that of the sum of the logits of `lower` minus those of
    `higher`, with the same weight for every box; this sum is used here, which keeps the digits that a difference of
    large numbers would lose. The step is E - eps * sign(gradient).

    Args:
        owl: The detector.
        vision: The detector's view of the image.
        lower: Embedded queries that lose score, [., d_text].
        higher: Embedded queries that gain score, [., d_text].
        eps: How far each number of E moves, the class token's included.

    Returns:
        The changed E, [1 + n, d].

    Raises:
        InputError: If `eps` is not above 0.
    """
    if not eps > 0:
        raise InputError(f"eps, the size of a signed step, is above 0, got {eps}")
    leaf = vision.tokens.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = owl.logits(owl.features(leaf), torch.cat([lower, higher]).clone())
        loss = logits[:, : len(lower)].sum() - logits[:, len(lower) :].sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
    return leaf.detach() - eps * gradient.sign()


def at_random(vision: Vision, size: float, seed: int) -> Tensor:
    """Return E changed by random signs, [1 + n, d].

    Args:
        vision: The detector's view of the image.
        size: The L2 norm of the change, as a share of the norm of E, as in `toward`.
        seed: The seed of the signs.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, vision.tokens.shape, generator=generator).to(vision.tokens) * 2 - 1
    return vision.tokens + _of_norm(signs, size * float(vision.tokens.norm()))


def _of_norm(change: Tensor, norm: float) -> Tensor:
    return change * (norm / change.norm().clamp_min(torch.finfo(change.dtype).tiny))
