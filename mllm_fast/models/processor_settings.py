"""Settings that a processor needs and some checkpoints leave out, filled in from the model's config."""

from __future__ import annotations

from typing import Any


def fill_settings(processor: Any, config: Any) -> None:
    """Give a processor its patch size, and what depends on it, if it has none.

    Checkpoints that were saved by old releases of transformers lack them, and the processor then fails with an error
    that does not say so.

    Args:
        processor: A processor; it is changed in place.
        config: The config of the whole model.
    """
    vision = getattr(config, "vision_config", None)
    if not hasattr(processor, "patch_size") or processor.patch_size is not None or vision is None:
        return
    size = getattr(vision, "patch_size", None)
    if size is None:
        return
    processor.patch_size = size
    if hasattr(processor, "vision_feature_select_strategy"):
        strategy = getattr(config, "vision_feature_select_strategy", None)
        processor.vision_feature_select_strategy = processor.vision_feature_select_strategy or strategy
    if getattr(processor, "num_additional_image_tokens", None) == 0 and "clip" in str(vision.model_type):
        processor.num_additional_image_tokens = 1  # its class token, which the strategy "default" leaves out
