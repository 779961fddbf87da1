"""Let a language model see the whole image, as the detector does.

LLaVA's processor crops the centre of an image that is not square, and detectors do not. A joint model needs one view
for both, so the released scripts of arXiv 2405.14612 switch the crop off: both models see the whole image, squashed to
a square.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..vlm import VLM

WHOLE, CROP = "whole", "crop"
VIEWS = (WHOLE, CROP)


def sees_whole(vlm: VLM) -> VLM:
    """Return the same model with a processor that resizes an image to the crop's size in place of cropping it.

    The given object and its processor are unchanged, and the two share the model. Without a crop, it is returned
    itself.
    """
    images = vlm.processor.image_processor
    if not getattr(images, "do_center_crop", False):
        return vlm
    processor, whole = copy.copy(vlm.processor), copy.deepcopy(images)
    height, width = images.crop_size["height"], images.crop_size["width"]
    whole.size = type(images.size)(height=height, width=width)
    whole.do_center_crop, whole.do_resize = False, True
    processor.image_processor = whole
    return vlm.with_processor(processor)
