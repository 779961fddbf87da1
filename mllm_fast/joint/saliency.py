"""Gradient alignment (arXiv 2405.14612): which boxes of a detector pull the vision embedding the way a word does.

The weight of box m is cos(dz_m/dE, dy/dE), z_m being its class logit for a query and y the word's logit, scaled so that
the boxes' weights run from 0 to 1; a pixel's saliency is the largest weight among the boxes that cover it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.errors import InputError
from ..explain.box_weights import BoxWeights
from .last_layer import cosines, has_known_form, row_by_row, structured

if TYPE_CHECKING:
    from .detector import Detector, Vision

FALLBACK = "the detector's head has another form: its gradients were taken by backward passes, box by box"


@torch.inference_mode(False)
def align(detector: Detector, vision: Vision, query: str, direction: Tensor) -> BoxWeights:
    """Weigh the boxes of a query against a direction in E, [1 + n, d], such as the gradient of a word's logit."""
    if direction.shape != vision.tokens.shape:
        raise InputError(f"the direction is {list(direction.shape)}, E is {list(vision.tokens.shape)}")
    tokens, direction = vision.tokens.clone(), direction.clone().to(vision.tokens)
    words = detector.embed_queries([query])[0].clone()
    known = has_known_form(detector)
    with torch.no_grad():
        found = (structured if known else row_by_row)(detector, tokens, words, direction)
    angles = cosines(found, direction).float().cpu()
    low, high = angles.min(), angles.max()
    weights = (angles - low) / (high - low) if high > low else torch.zeros_like(angles)
    boxes = detector.boxes(vision, words[None])
    return BoxWeights(
        query=query,
        weights=weights,
        cosines=angles,
        scores=boxes.logits[:, 0].sigmoid().cpu().clone(),
        boxes=boxes.boxes.float().cpu().clone(),
        size=vision.picture.size,
        note="" if known else FALLBACK,
    )
