"""The opposite direction: the language model's own vision embedding, mapped to the detector's heads.

The supplement of arXiv 2405.14612 proposes it and reports that the authors found no map that works. The language model
keeps its own eyes, so its text does not change by a bit, and only the boxes can suffer.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from ..core.errors import InputError
from ..core.images import ImageSource
from ..models.offload import device_of
from ..vlm import VLM
from .alignment import Alignment
from .checkpoint import REVERSE, WEIGHTS, joint_folder, part_names, read_settings
from .detector import Boxes, Detector, Vision
from .grids import resample, single_tile
from .image_features import own_features
from .weights_id import weights_name
from .whole_image import WHOLE, sees_whole

if TYPE_CHECKING:
    from ..core.layout import Tile


class ReverseJoint:
    """A detector whose boxes are computed from the language model's own vision embedding.

    The embedding is the input of the language model's projector. U maps each token of it, and their mean in place of
    the class token, to the detector's embedding E.

    Args:
        owl: The detector.
        alignment: U.
        vlm: The language model and its processor.
        view: What of an image the language model sees, as in `JointModel`.

    Raises:
        InputError: U was trained between two other models, or does not fit them.
    """

    def __init__(self, owl: Detector, alignment: Alignment, vlm: VLM, view: str = WHOLE):
        models = {"owl": owl.model, "vlm": vlm.model}
        for part, model in models.items():
            if alignment.pair.get(part) not in (None, weights_name(model)):
                raise InputError("U was trained between two other models; train one: mllm-fast joint train --direction")
        if alignment.config.outputs != owl.width:
            raise InputError(f"U gives {alignment.config.outputs} numbers a token, the detector reads {owl.width}")
        self.owl = owl
        self.vlm = sees_whole(vlm) if view == WHOLE else vlm
        self.alignment = alignment.to(device_of(vlm.model)).eval()

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], *, vlm: VLM | None = None, **options: Any) -> ReverseJoint:
        """Load what `mllm-fast joint train --direction model-to-detector` wrote.

        Args:
            name: The folder.
            vlm: The language model, if it is loaded already.
            **options: Options of `VLM.from_pretrained`.
        """
        folder = joint_folder(name)
        settings = read_settings(folder)
        if settings["direction"] != REVERSE:
            raise InputError(f"{folder}: holds a joint model of the usual direction; load it with JointModel")
        detector, model = part_names(folder)
        owl = Detector.from_pretrained(detector, device=options.get("device"), progress=options.get("progress"))
        vlm = VLM.from_pretrained(model, **options) if vlm is None else vlm
        return cls(owl, Alignment.load(folder / WEIGHTS), vlm, settings["view"])

    @torch.inference_mode()
    def see(self, image: ImageSource) -> tuple[Vision, Vision]:
        """Return the detector's own view of an image, and the same image with U of the language model's embedding."""
        own = self.owl.see(image)
        given = reverse_inputs(self.vlm, [own.picture], own.tile)[0]
        tokens = self.alignment(given.to(next(self.alignment.parameters())))
        return own, own.with_tokens(tokens.to(own.tokens))

    def boxes(self, image: ImageSource, queries: Sequence[str]) -> Boxes:
        """Return one box per token, with its logit for each text query, from the language model's embedding."""
        return self.owl.boxes(self.see(image)[1], queries)


def vision_embeddings(vlm: VLM, images: Sequence[Image.Image]) -> tuple[Tensor, list[Tile]]:
    """Return the input of the language model's projector, [images, tokens, d], and the grid of each image."""
    inputs, layouts, _ = vlm.prompts.prepare([[image] for image in images], ["?"] * len(images))
    projector = getattr(vlm.model.model, "multi_modal_projector", None)
    if projector is None:
        raise InputError(f"{vlm.model.config.model_type} has no projector whose input could be mapped to a detector")
    found: list[Tensor] = []
    handle = projector.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    try:
        own_features(vlm, inputs)
    finally:
        handle.remove()
    tokens = torch.cat([part.reshape(-1, part.shape[-1]) for part in found])
    return tokens.reshape(len(images), -1, tokens.shape[-1]).float(), [
        single_tile(layout.images[0].tiles) for layout in layouts
    ]


def reverse_inputs(vlm: VLM, images: Sequence[Image.Image], tile: Tile) -> Tensor:
    """Return what U reads: the mean of an image's tokens and the tokens on the detector's grid, [images, 1 + n, d]."""
    tokens, tiles = vision_embeddings(vlm, images)
    placed = torch.stack([resample(one, given, tile) for one, given in zip(tokens, tiles, strict=True)])
    return torch.cat([placed.mean(1, keepdim=True), placed], 1)


@torch.no_grad()
def reverse_embeddings(owl: Detector, vlm: VLM, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
    """Compute the inputs and the targets of U for some images, both [images, 1 + n, d] in float32."""
    visions = owl.see_many(images)
    given = torch.cat(
        [reverse_inputs(vlm, [image], vision.tile) for image, vision in zip(images, visions, strict=True)]
    )
    return given, torch.stack([vision.tokens.clone() for vision in visions]).float()
