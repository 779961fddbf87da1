"""Gradient alignment (arXiv 2405.14612): find the boxes that pull the vision embedding in the same direction as a word.

The weight of box m is cos(dz_m/dE, dy/dE). Here, z_m is the class logit of the box for a query, and y is the logit of
the word. The weights are scaled so that they run from 0 to 1 over the boxes. The saliency of a pixel is the largest
weight of the boxes that cover it.
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
    """Weigh the boxes of a query by the alignment of their gradients with a direction in E.

    Args:
        detector: The detector.
        vision: The detector's view of the image.
        query: The text query.
        direction: The direction, for example the gradient of a word's logit, [1 + n, d].

    Raises:
        InputError: If the direction and E differ in shape.
    """
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
