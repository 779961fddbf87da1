"""Find the mask of an object by its name, with a segmentation model of transformers that reads text.

arXiv 2411.17491 (section 4.5) takes masks from a text-prompted Segment Anything model. Any of these does:

- CLIPSeg, such as "CIDAS/clipseg-rd64-refined".
- SAM 3, such as "facebook/sam3".
- A detector and a segmenter of boxes, joined by "+", such as "IDEA-Research/grounding-dino-tiny+facebook/sam-vit-base":
  any model of transformers for zero-shot object detection, and any for mask generation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from transformers import AutoProcessor

from ..core.errors import InputError, first_line

_THRESHOLD = 0.3  # the least score of a box, or of an instance
_INSIDE = 0.5  # the least probability of a pixel

Find = Callable[[Image.Image, str], np.ndarray]


class Segmenter:
    """A model that finds the mask of an object by its name.

    Args:
        name: A folder or a hub id, or two of them with "+" between, see the module.
        device: The device of the models.

    Raises:
        InputError: The model cannot be loaded, or is of another kind.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        self.name, self.device = name, torch.device(device)
        self._find: Find | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_find": None}  # each process loads its own

    def mask(self, image: Image.Image, name: str) -> np.ndarray:
        """Return the mask of everything that the model takes for the object, bool [height, width].

        It is empty if the model finds none.
        """
        if self._find is None:
            self._find = self._load()
        with torch.inference_mode():
            return self._find(image.convert("RGB"), name)

    def _load(self) -> Find:
        names = self.name.split("+")
        try:
            if len(names) == 2:
                return self._boxes_then_masks(*names)
            kind = transformers.AutoConfig.from_pretrained(self.name, trust_remote_code=False).model_type
            if kind in ("clipseg", "sam3"):
                return self._clipseg() if kind == "clipseg" else self._sam3()
        except (OSError, ValueError, ImportError) as error:
            raise InputError(f"{self.name}: cannot be loaded: {first_line(error)}") from error
        raise InputError(
            f"{self.name}: is a {kind!r}; a segmenter that reads text is CLIPSeg, SAM 3, or a detector and a segmenter"
            " of boxes, as in DETECTOR+SAM"
        )

    def _clipseg(self) -> Find:
        processor = AutoProcessor.from_pretrained(self.name, trust_remote_code=False)
        model = transformers.CLIPSegForImageSegmentation.from_pretrained(self.name).eval().to(self.device)

        def find(image: Image.Image, name: str) -> np.ndarray:
            inputs = processor(images=[image], text=[name], return_tensors="pt").to(self.device)
            logits = model(**inputs).logits
            return _at_size(logits.reshape(1, 1, *logits.shape[-2:]).sigmoid(), image) > _INSIDE

        return find

    def _sam3(self) -> Find:
        processor = AutoProcessor.from_pretrained(self.name, trust_remote_code=False)
        model = transformers.Sam3Model.from_pretrained(self.name).eval().to(self.device)

        def find(image: Image.Image, name: str) -> np.ndarray:
            inputs = processor(images=image, text=name, return_tensors="pt").to(self.device)
            (found,) = processor.post_process_instance_segmentation(
                model(**inputs), threshold=_THRESHOLD, mask_threshold=_INSIDE, target_sizes=[image.size[::-1]]
            )
            return _union(found["masks"], image)

        return find

    def _boxes_then_masks(self, detector: str, segmenter: str) -> Find:
        reads, draws = (AutoProcessor.from_pretrained(name, trust_remote_code=False) for name in (detector, segmenter))
        detects = (
            transformers.AutoModelForZeroShotObjectDetection.from_pretrained(detector, trust_remote_code=False)
            .eval()
            .to(self.device)
        )
        segments = (
            transformers.AutoModelForMaskGeneration.from_pretrained(segmenter, trust_remote_code=False)
            .eval()
            .to(self.device)
        )
        sentences = "dino" in detects.config.model_type  # Grounding DINO ends each phrase with a full stop

        def find(image: Image.Image, name: str) -> np.ndarray:
            text: Any = f"{name}." if sentences else [[f"a photo of a {name}"]]
            inputs = reads(images=image, text=text, return_tensors="pt").to(self.device)
            (found,) = reads.post_process_grounded_object_detection(
                detects(**inputs), threshold=_THRESHOLD, target_sizes=[image.size[::-1]]
            )
            if not len(found["boxes"]):
                return np.zeros(image.size[::-1], bool)
            inputs = draws(images=image, input_boxes=[found["boxes"].tolist()], return_tensors="pt").to(self.device)
            masks = segments(**inputs, multimask_output=False).pred_masks.cpu()
            sizes = [inputs[key].cpu() for key in ("original_sizes", "reshaped_input_sizes") if key in inputs]
            (drawn,) = draws.post_process_masks(masks, *sizes)
            return _union(drawn, image)

        return find


def _at_size(values: torch.Tensor, image: Image.Image) -> np.ndarray:
    """Return values [1, 1, h, w] at the size of the image."""
    size = image.size[::-1]
    return F.interpolate(values.float(), size=size, mode="bilinear", align_corners=False)[0, 0].cpu().numpy()


def _union(masks: torch.Tensor, image: Image.Image) -> np.ndarray:
    """Return the pixels of any of the masks [..., h, w], bool [height, width]."""
    flat = masks.reshape(-1, *masks.shape[-2:]).bool() if len(masks) else torch.zeros(1, *image.size[::-1]).bool()
    return flat.any(0).cpu().numpy()
