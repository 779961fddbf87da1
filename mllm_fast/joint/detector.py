"""The detector of the joint model: it computes one vision embedding E per image, and boxes for text queries from E."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..core.errors import InputError
from ..core.images import MAX_PIXELS, ImageSource, load_image
from ..core.layout import Box, Tile
from ..models.loading import failures, parse_device, parse_dtype, quiet, shows_bars

ARCHITECTURES = ("owlvit", "owlv2")
OVERLAP = 0.5  # if two boxes of one query overlap by more than this, only the better one is kept


@dataclass(frozen=True)
class Vision:
    """The detector's view of one image.

    Attributes:
        picture: The image.
        tokens: The vision embedding E, [1 + rows * cols, d], with the class token first. E is the input of the last
            layer of the detector's vision tower.
        tile: The grid of tokens and the area it covers. OWLv2 pads images to squares, so its area can be larger than
            the image.
    """

    picture: Image.Image
    tokens: Tensor
    tile: Tile

    def with_tokens(self, tokens: Tensor) -> Vision:
        """Return a copy with another E, for example a perturbed one."""
        if tokens.shape != self.tokens.shape:
            raise InputError(f"E is {list(self.tokens.shape)}, got {list(tokens.shape)}")
        return replace(self, tokens=tokens)


class Boxes(NamedTuple):
    """One box per token.

    Attributes:
        logits: The logit of each box for each query, [tokens, queries].
        boxes: Left, top, right and bottom in pixels of the image, [tokens, 4]. The boxes are not clipped to the image.
    """

    logits: Tensor
    boxes: Tensor


class Detection(NamedTuple):
    """A box that was found for a query.

    Attributes:
        query: The text query.
        score: The score, 0 to 1.
        box: Left, top, right and bottom in pixels, clipped to the image.
    """

    query: str
    score: float
    box: Box


class Detector:
    """A detector with its processor.

    Args:
        model: An `OwlViTForObjectDetection` or `Owlv2ForObjectDetection` of transformers.
        processor: The processor of the model.

    Raises:
        InputError: If the model is of another kind.
    """

    def __init__(self, model: Any, processor: Any):
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        if kind not in ARCHITECTURES or not hasattr(model, "class_head"):
            raise InputError(
                f"the detector is an OwlViTForObjectDetection or an Owlv2ForObjectDetection, got {type(model).__name__}"
            )
        self.model = model.eval()
        self.processor = processor
        self.base = getattr(model, model.base_model_prefix)
        self.vision = self.base.vision_model
        self.last_layer = self.vision.encoder.layers[-1]

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        progress: bool | None = None,
        **options: Any,
    ) -> Detector:
        """Load a detector.

        Args:
            name: A folder or a hub id.
            device: The device of the model.
            dtype: The dtype of the weights; float32 by default.
            progress: As in `VLM.from_pretrained`.
            **options: Other options of transformers' `from_pretrained`.

        Raises:
            InputError: If the model is of another kind, or if the weights lack tensors.
        """
        from transformers import AutoConfig, AutoProcessor, Owlv2ForObjectDetection, OwlViTForObjectDetection

        where = parse_device(device)
        with failures(str(name)), quiet(shows_bars(str(name), progress)):
            kind = AutoConfig.from_pretrained(name, **options).model_type
            if kind not in ARCHITECTURES:
                raise InputError(f"{name}: a detector is one of {', '.join(ARCHITECTURES)}, got {kind}")
            loader: Any = OwlViTForObjectDetection if kind == "owlvit" else Owlv2ForObjectDetection
            model, report = loader.from_pretrained(
                name, dtype=parse_dtype(dtype or torch.float32, where), output_loading_info=True, **options
            )
            processor = AutoProcessor.from_pretrained(name, **options)
        missing = sorted(report["missing_keys"])
        if missing:
            raise InputError(
                f"{name}: the weights lack {len(missing)} tensors, {missing[0]} among them; copy them again"
            )
        return cls(model.to(where), processor)

    @property
    def width(self) -> int:
        """The number of values per token of E."""
        return self.model.config.vision_config.hidden_size

    @property
    def device(self) -> torch.device:
        return self.model.device

    def see(self, image: ImageSource) -> Vision:
        """Read an image.

        Raises:
            InputError: If it is not an image, or if it is smaller than a patch of the detector.
        """
        return self.see_many([image])[0]

    @torch.inference_mode()
    def see_many(self, images: Sequence[ImageSource], max_pixels: int = MAX_PIXELS) -> list[Vision]:
        """Read several images in one batch; no image may be larger than `max_pixels`."""
        pictures = [load_image(image, max_pixels) for image in images]
        for picture in pictures:
            self.check_size(picture)
        pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
        hidden = self.embed(pixels.to(self.device, self.model.dtype))
        rows, cols = self.model.num_patches_height, self.model.num_patches_width
        return [
            Vision(picture, tokens.clone(), Tile(rows, cols, self._seen_box(picture)))
            for picture, tokens in zip(pictures, hidden, strict=True)
        ]

    def embed(self, pixels: Tensor) -> Tensor:
        """Return E of preprocessed images: [B, 3, H, W] -> [B, 1 + tokens, d].

        This runs the vision tower without its last layer.
        """
        hidden = self.vision.pre_layernorm(self.vision.embeddings(pixels))
        for layer in self.vision.encoder.layers[:-1]:
            hidden = _first(layer(hidden, None))
        return hidden

    @torch.inference_mode()
    def embed_queries(self, queries: Sequence[str]) -> Tensor:
        """Return the detector's embeddings of text queries, [queries, d_text].

        Raises:
            InputError: If there is no query, or if one is empty or longer than the text window.
        """
        if isinstance(queries, str) or not queries:
            raise InputError("give at least one text query in a list: ['a photo of a dog']")
        for query in queries:
            if not query.strip():
                raise InputError("a text query is empty; give something to look for: 'a photo of a dog'")
        window = self.model.config.text_config.max_position_embeddings
        tokenizer = self.processor.tokenizer
        for query in queries:
            length = len(tokenizer(query, verbose=False).input_ids)  # no warning: the error below says it
            if length > window:
                raise InputError(
                    f"the query {query!r} takes {length} tokens, the detector's text window is {window}; shorten it"
                )
        found = tokenizer(list(queries), padding="max_length", max_length=window, return_tensors="pt").to(self.device)
        words = self.base.text_model(input_ids=found["input_ids"], attention_mask=found["attention_mask"])
        return self.base.text_projection(words.pooler_output)

    def features(self, tokens: Tensor) -> Tensor:
        """Return the features that the heads read: E [..., 1 + n, d] -> [..., n, d]. Gradients flow through them."""
        lead = tokens.shape[:-2]
        hidden = _first(self.last_layer(tokens.reshape(-1, *tokens.shape[-2:]), None))
        return self.merge(hidden[:, 1:], hidden[:, :1]).reshape(*lead, -1, tokens.shape[-1])

    def merge(self, patches: Tensor, first: Tensor) -> Tensor:
        """Combine the last layer's outputs for patches and for the class token into the features of the heads."""
        norm = self.vision.post_layernorm
        return self.model.layer_norm(norm(patches) * norm(first))

    def logits(self, features: Tensor, queries: Tensor) -> Tensor:
        """Return the class logits [..., n, queries] of features [..., n, d] and embedded queries."""
        lead = features.shape[:-2]
        flat = features.reshape(-1, *features.shape[-2:])
        found, _ = self.model.class_predictor(flat, queries.to(flat).expand(len(flat), -1, -1))
        return found.reshape(*lead, *found.shape[-2:])

    @torch.inference_mode()
    def boxes(self, vision: Vision, queries: Sequence[str] | Tensor) -> Boxes:
        """Compute one box per token from E, with its logit for each query.

        Args:
            vision: The detector's view of the image.
            queries: Text queries, or their embeddings.
        """
        words = queries if isinstance(queries, Tensor) else self.embed_queries(queries)
        features = self.features(vision.tokens)
        rows, cols = vision.tile.rows, vision.tile.cols
        raw = self.model.box_predictor(features[None], features.reshape(1, rows, cols, -1))[0].float()
        left, top, right, bottom = vision.tile.box
        scale = raw.new_tensor([right - left, bottom - top] * 2)
        center, size = (raw * scale).split(2, -1)
        corners = torch.cat([center - size / 2, center + size / 2], -1) + raw.new_tensor([left, top] * 2)
        return Boxes(self.logits(features, words).float(), corners)

    def detect(
        self, vision: Vision, queries: Sequence[str], threshold: float = 0.3, overlap: float | None = OVERLAP
    ) -> list[Detection]:
        """Return the boxes of all queries, best first.

        Args:
            vision: The detector's view of the image.
            queries: Text queries.
            threshold: The lowest score of a box that is returned, 0 to 1.
            overlap: If two boxes of one query overlap by more than this (intersection over union), only the better one
                is returned. With None, all boxes are returned.

        Raises:
            InputError: If the threshold is not between 0 and 1.
        """
        if not 0 <= threshold <= 1:
            raise InputError(f"threshold is 0 to 1, got {threshold}")
        found = self.boxes(vision, queries)
        width, height = vision.picture.size
        edges = found.boxes.new_tensor([width, height] * 2)
        corners = torch.minimum(found.boxes.clamp_min(0), edges)
        overlaps = iou(corners[:, None], corners)
        detections = []
        for query, scores in zip(queries, found.logits.sigmoid().T, strict=True):
            detections += [
                Detection(query, float(scores[i]), tuple(corners[i].tolist()))
                for i in kept_boxes(scores, overlaps, threshold, overlap)
            ]
        return sorted(detections, key=lambda one: -one.score)

    def _seen_box(self, picture: Image.Image) -> Box:
        width, height = (float(side) for side in picture.size)
        if getattr(self.processor.image_processor, "do_pad", False):  # OWLv2 pads right and below, to a square
            return 0.0, 0.0, max(width, height), max(width, height)
        return 0.0, 0.0, width, height

    def check_size(self, picture: Image.Image) -> None:
        """Raise InputError for an image smaller than a patch."""
        patch = self.model.config.vision_config.patch_size
        if min(picture.size) < patch:
            raise InputError(
                f"the image is {picture.width} x {picture.height} pixels, smaller than one patch of the detector"
                f" ({patch} x {patch}); give a larger one"
            )


def kept_boxes(scores: Tensor, overlaps: Tensor, threshold: float, limit: float | None = OVERLAP) -> list[int]:
    """Select the boxes of one query by non-maximum suppression.

    Args:
        scores: The scores of the boxes, [n].
        overlaps: The overlap of each box with each other box, [n, n].
        threshold: The lowest score that is kept.
        limit: A box is dropped if it overlaps a better one by more than this. With None, none is dropped.

    Returns:
        The indices of the kept boxes, best first.
    """
    kept: list[int] = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if float(scores[i]) < threshold:
            break
        if limit is None or not kept or float(overlaps[i, kept].max()) <= limit:
            kept.append(i)
    return kept


def iou(box: Tensor, others: Tensor) -> Tensor:
    """Return the intersection over union [...] of boxes [..., 4] (left, top, right, bottom)."""
    low, high = torch.maximum(box[..., :2], others[..., :2]), torch.minimum(box[..., 2:], others[..., 2:])
    both = (high - low).clamp_min(0).prod(-1)
    area = (box[..., 2:] - box[..., :2]).prod(-1) + (others[..., 2:] - others[..., :2]).prod(-1)
    return both / (area - both).clamp_min(1e-9)


def _first(output: Any) -> Tensor:
    """Return the hidden states of a layer's output; some releases of transformers wrap them in a tuple."""
    return output[0] if isinstance(output, tuple) else output
