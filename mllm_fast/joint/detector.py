"""The detector's side: one image, one vision embedding E, and boxes for any text queries from it."""

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
from ..models.loading import failures, parse_device, parse_dtype, quiet

ARCHITECTURES = ("owlvit", "owlv2")
OVERLAP = 0.5  # of two boxes of one query, beyond which the better one alone is kept


@dataclass(frozen=True)
class Vision:
    """What the detector saw of one image.

    tokens: the vision embedding E, [1 + rows * cols, d], the class token first: what the last layer of the detector's
    vision tower reads. tile: the grid, and the part of the image it lies over (of an OWLv2, which pads images to
    squares, more than the image).
    """

    picture: Image.Image
    tokens: Tensor
    tile: Tile

    def with_tokens(self, tokens: Tensor) -> Vision:
        """The same image seen otherwise, as after a perturbation of E."""
        if tokens.shape != self.tokens.shape:
            raise InputError(f"E is {list(self.tokens.shape)}, got {list(tokens.shape)}")
        return replace(self, tokens=tokens)


class Boxes(NamedTuple):
    """One box a token: `logits` [tokens, queries]; `boxes` [tokens, 4], left, top, right, bottom in pixels of the
    image, not cut at its edges."""

    logits: Tensor
    boxes: Tensor


class Detection(NamedTuple):
    """A box of a query: its score, 0 to 1, and left, top, right, bottom in pixels, within the image."""

    query: str
    score: float
    box: Box


class Detector:
    """An `OwlViTForObjectDetection` or `Owlv2ForObjectDetection` of transformers, and its processor.

    Raises:
        InputError: a model of another kind.
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
        **options: Any,
    ) -> Detector:
        """A folder or a hub id, by default in float32; other options go to transformers' `from_pretrained`."""
        from transformers import AutoConfig, AutoProcessor, Owlv2ForObjectDetection, OwlViTForObjectDetection

        where = parse_device(device)
        with failures(str(name)), quiet():
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
        """Numbers of a token of E."""
        return self.model.config.vision_config.hidden_size

    @property
    def device(self) -> torch.device:
        return self.model.device

    def see(self, image: ImageSource) -> Vision:
        """Read an image.

        Raises:
            InputError: not an image, or one smaller than a patch of the detector as it scales it.
        """
        return self.see_many([image])[0]

    @torch.inference_mode()
    def see_many(self, images: Sequence[ImageSource], max_pixels: int = MAX_PIXELS) -> list[Vision]:
        """Read images in one batch; none is larger than `max_pixels`."""
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
        """E of preprocessed images [B, 3, H, W], [B, 1 + tokens, d]: the vision tower without its last layer."""
        hidden = self.vision.pre_layernorm(self.vision.embeddings(pixels))
        for layer in self.vision.encoder.layers[:-1]:
            hidden = _first(layer(hidden, None))
        return hidden

    @torch.inference_mode()
    def embed_queries(self, queries: Sequence[str]) -> Tensor:
        """The detector's embeddings of texts, [queries, d_text].

        Raises:
            InputError: no query, an empty one, or one longer than the text window.
        """
        if isinstance(queries, str) or not queries:
            raise InputError("give at least one text query in a list: ['a photo of a dog']")
        for query in queries:
            if not query.strip():
                raise InputError("a text query is empty; give something to look for: 'a photo of a dog'")
        window = self.model.config.text_config.max_position_embeddings
        tokenizer = self.processor.tokenizer
        for query in queries:
            length = len(tokenizer(query, verbose=False).input_ids)  # we say what is too long
            if length > window:
                raise InputError(
                    f"the query {query!r} takes {length} tokens, the detector's text window is {window}; shorten it"
                )
        found = tokenizer(list(queries), padding="max_length", max_length=window, return_tensors="pt").to(self.device)
        words = self.base.text_model(input_ids=found["input_ids"], attention_mask=found["attention_mask"])
        return self.base.text_projection(words.pooler_output)

    def features(self, tokens: Tensor) -> Tensor:
        """What the heads read of E [..., 1 + n, d]: [..., n, d]. Gradients flow through it."""
        lead = tokens.shape[:-2]
        hidden = _first(self.last_layer(tokens.reshape(-1, *tokens.shape[-2:]), None))
        return self.merge(hidden[:, 1:], hidden[:, :1]).reshape(*lead, -1, tokens.shape[-1])

    def merge(self, patches: Tensor, first: Tensor) -> Tensor:
        """The last layer's output of patches and of the class token, as the heads read them."""
        norm = self.vision.post_layernorm
        return self.model.layer_norm(norm(patches) * norm(first))

    def logits(self, features: Tensor, queries: Tensor) -> Tensor:
        """Class logits [..., n, queries] of features [..., n, d] and embedded queries."""
        lead = features.shape[:-2]
        flat = features.reshape(-1, *features.shape[-2:])
        found, _ = self.model.class_predictor(flat, queries.to(flat).expand(len(flat), -1, -1))
        return found.reshape(*lead, *found.shape[-2:])

    @torch.inference_mode()
    def boxes(self, vision: Vision, queries: Sequence[str] | Tensor) -> Boxes:
        """One box a token, and its logit for each query, from E."""
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
        """The boxes of each query whose score is `threshold` or more, best first; of boxes of one query that overlap by
        more than `overlap` (intersection over union) the best; all of them if it is None."""
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
        if getattr(self.processor.image_processor, "do_pad", False):  # OWLv2 pads to a square, right and below
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
    """Of one query the boxes of `threshold` or more, best first, without those that overlap a better one by more than
    `limit` (non-maximum suppression). scores: [n]; overlaps: of each box with each other one, [n, n]."""
    kept: list[int] = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if float(scores[i]) < threshold:
            break
        if limit is None or not kept or float(overlaps[i, kept].max()) <= limit:
            kept.append(i)
    return kept


def iou(box: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of boxes [..., 4] (left, top, right, bottom): [...]."""
    low, high = torch.maximum(box[..., :2], others[..., :2]), torch.minimum(box[..., 2:], others[..., 2:])
    both = (high - low).clamp_min(0).prod(-1)
    area = (box[..., 2:] - box[..., :2]).prod(-1) + (others[..., 2:] - others[..., :2]).prod(-1)
    return both / (area - both).clamp_min(1e-9)


def _first(output: Any) -> Tensor:
    """A layer's hidden states; some releases wrap them in a tuple."""
    return output[0] if isinstance(output, tuple) else output
