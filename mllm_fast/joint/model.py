"""The joint model: a detector and a vision-language model that share one vision embedding (arXiv 2405.14612)."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor

from ..context.context import Context
from ..core.errors import InputError, check_choice
from ..core.images import ImageSource
from ..core.layout import Tile
from ..explain.box_weights import BoxWeights
from ..explain.explanation import Explanation
from ..explain.stream import Stream
from ..models.loading import EMBEDDED
from ..models.offload import device_of
from ..runtime.answer import Answer
from ..vlm import VLM
from .alignment import Alignment
from .checkpoint import REVERSE, WEIGHTS, joint_folder, part_names, read_settings
from .detector import OVERLAP, Boxes, Detection, Detector, Vision
from .grids import note, resample, single_tile
from .image_features import check_fixed_grid, given_features
from .lora import merged
from .saliency import align
from .weights_id import weights_name
from .whole_image import VIEWS, WHOLE, sees_whole

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Seen:
    """An image as both models see it.

    Attributes:
        vision: The detector's view of the image.
        tile: The grid of tokens that the language model reads.
        note: Says in words what was resampled; empty if nothing was.
    """

    vision: Vision
    tile: Tile

    @property
    def note(self) -> str:
        return note(self.vision.tile, self.tile)

    def with_tokens(self, tokens: Tensor) -> Seen:
        """Return a copy with another vision embedding E, [1 + n, d]."""
        return replace(self, vision=self.vision.with_tokens(tokens))


Sight = ImageSource | Seen


class JointModel:
    """A detector and a language model that both read one vision embedding E of an image.

    E is the input of the detector's last layer. The boxes are computed from E by that layer and the detector's heads.
    For the text, W maps E without its class token to image embeddings. The language model reads these in place of its
    own.

    Args:
        owl: The detector.
        alignment: W.
        vlm: The language model and its processor.
        view: What of an image the language model sees: "whole" (squashed to a square, as by the detector), or "crop"
            (what its processor crops).

    Raises:
        InputError: If the VLM's grid of tokens varies with the image, if the sizes of W do not fit the two models, or
            if W was trained between two other models.
    """

    def __init__(self, owl: Detector, alignment: Alignment, vlm: VLM, view: str = WHOLE):
        check_choice("view", view, VIEWS)
        check_fixed_grid(vlm)
        if vlm.text.split is not None:
            raise InputError("the language model of a joint model lies in one process: load it without tp")
        width = vlm.text.width
        given = alignment.config.inputs, alignment.config.outputs
        if given != (owl.width, width):
            raise InputError(
                f"W maps {given[0]} numbers a token to {given[1]}, the detector gives {owl.width} and the language"
                f" model reads {width}; train one for this pair: mllm-fast joint train"
            )
        models = {"owl": owl.model, "vlm": vlm.model}
        for part, name in (("owl", "detector"), ("vlm", "language model")):
            trained = alignment.pair.get(part)
            if trained is not None and trained != weights_name(models[part]):
                raise InputError(
                    f"W was trained with another {name} (weights {trained[:12]}); load that one, or train W for this"
                    " pair: mllm-fast joint train"
                )
        self.owl, self.view = owl, view
        self.vlm = sees_whole(vlm) if view == WHOLE else vlm
        self.alignment = alignment.to(device_of(vlm.model)).eval()

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] = EMBEDDED,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        vlm: VLM | None = None,
        **options: Any,
    ) -> JointModel:
        """Load a joint model and its two parts.

        Args:
            name: "shapes" (the embedded joint model), or a folder that `mllm-fast joint train` wrote.
            device: The device, as in `VLM.from_pretrained`. The detector is small and always on one device.
            dtype: The dtype of the language model, as in `VLM.from_pretrained`. The detector is always float32.
            vlm: The language model, if it is loaded already. A fine-tuned joint model loads one of its own instead.
            **options: Other options of `VLM.from_pretrained`.
        """
        folder = joint_folder(name)
        settings = read_settings(folder)
        if settings["direction"] == REVERSE:
            raise InputError(
                f"{folder}: maps the language model's embedding to the detector; load it with ReverseJoint"
            )
        detector, model = part_names(folder)
        alignment = Alignment.load(folder / WEIGHTS)
        where = None if device == "auto" else device
        owl = Detector.from_pretrained(detector, device=where, progress=options.get("progress"))
        tuned = "lora" in settings  # adapters are merged into the weights, so such a model needs its own copy
        if vlm is None or tuned:
            vlm = VLM.from_pretrained(model, device=device, dtype=dtype, **options)
        if tuned:
            vlm = merged(vlm, folder / settings["lora"], alignment.about.get("finetuned", {}).get("base"))
        _log.info("joined the detector %s and the model %s by %s", detector, model, folder)
        return cls(owl, alignment, vlm, settings["view"])

    def see(self, image: Sight) -> Seen:
        """Read an image once, so that any number of later calls can use the result; a `Seen` is returned as it is."""
        return image if isinstance(image, Seen) else self.see_many([image])[0]

    def see_many(self, images: Sequence[ImageSource]) -> list[Seen]:
        """Read several images in one batch."""
        visions = self.owl.see_many(images, self.vlm.prompts.max_pixels)
        return [Seen(vision, _tile(self.vlm, vision)) for vision in visions]

    def image_embeddings(self, seen: Seen) -> Tensor:
        """Return the image embeddings that the language model reads, [tokens, d_text].

        They are W applied to E without its class token, on the language model's grid. Gradients flow through them.
        """
        tokens = resample(seen.vision.tokens[1:], seen.vision.tile, seen.tile)
        return self.alignment(tokens.to(next(self.alignment.parameters())))

    @overload
    def generate(self, image: Sight | Sequence[Sight], prompt: str, **options: Any) -> Answer: ...
    @overload
    def generate(self, image: Sequence[Any], prompt: list[str], **options: Any) -> list[Answer]: ...

    def generate(self, image: Any, prompt: Any, **options: Any) -> Any:
        """Generate like `VLM.generate`, but from the detector's vision embedding.

        An image may also be a `Seen`.
        """
        many = not isinstance(prompt, str)
        prompts = [self._pictures(one) for one in image] if many else [self._pictures(image)]
        pictures = [[seen.vision.picture for seen in one] for one in prompts]
        with self.reading([seen for one in prompts for seen in one]):
            return self.vlm.generate(pictures if many else pictures[0], prompt, **options)

    def explain(
        self,
        image: Sight | Sequence[Sight],
        prompt: str,
        answer: str | None = None,
        *,
        query: str | None = None,
        **options: Any,
    ) -> Explanation:
        """Explain like `VLM.explain`, but from the detector's vision embedding.

        Heatmaps can also be drawn with the method "gradient-alignment". `Explanation.box_weights` gives the boxes
        behind them.

        Args:
            image: One image or several; each may also be a `Seen`.
            prompt: The prompt.
            answer: The answer, as in `VLM.explain`.
            query: What the detector looks for in gradient alignment. The default is "a photo of a WORD", with the word
                of each token.
            **options: Other options of `VLM.explain`.
        """
        seen = self._pictures(image)
        with self.reading(seen):
            ex = self.vlm.explain([one.vision.picture for one in seen], prompt, answer, **options)
        found: dict[tuple, BoxWeights] = {}

        def boxes_of(token: int, asked: str | None, image: int) -> BoxWeights:
            key = token, asked or query, image
            if key not in found:
                found[key] = self.box_weights(ex, seen[image], *key)
            return found[key]

        ex.boxes_of = boxes_of
        return ex

    def stream(self, image: Sight | Sequence[Sight], prompt: str, **options: Any) -> Stream:
        """Stream like `VLM.stream`, but from the detector's vision embedding."""
        seen = self._pictures(image)
        with self.reading(seen):  # some releases of transformers read the image here, others in the first pass
            stream = self.vlm.stream([one.vision.picture for one in seen], prompt, **options)
        stream.first = self.reading(seen)
        return stream

    def compress(self, image: Sight | Sequence[Sight], *args: Any, **options: Any) -> Context:
        """Compress like `VLM.compress`, but from the detector's vision embedding."""
        seen = self._pictures(image)
        with self.reading(seen):
            return self.vlm.compress([one.vision.picture for one in seen], *args, **options)

    def boxes(self, image: Sight, queries: Sequence[str]) -> Boxes:
        """Return one box per token of E, with its logit for each text query."""
        return self.owl.boxes(self.see(image).vision, queries)

    def detect(
        self, image: Sight, queries: Sequence[str], threshold: float = 0.3, overlap: float | None = OVERLAP
    ) -> list[Detection]:
        """Return the boxes of text queries, best first; see `Detector.detect`."""
        return self.owl.detect(self.see(image).vision, queries, threshold, overlap)

    def direction(self, ex: Explanation, seen: Seen, token: int, image: int = 0) -> Tensor:
        """Return the gradient dy/dE of the logit y of a token.

        Args:
            ex: An explanation by this model.
            seen: The image.
            token: The index of the token in the explanation.
            image: The index of the image in the prompt.

        Returns:
            The gradient, [1 + n, d]. It is 0 at the class token.
        """
        row = ex.trace.rows[token]
        positions = ex.layout.images[image].positions
        with ex.replay.differentiable(row + 1) as embeds:
            hidden = ex.replay.hidden_states(row + 1, lambda layer, alpha: None, embeds)
            logit = ex.replay.text.logits(hidden[-1])[ex.token_ids[token]]
            (gradient,) = torch.autograd.grad(logit, embeds)
            leaf = seen.vision.tokens.detach().clone().requires_grad_()
            read = self.image_embeddings(seen.with_tokens(leaf))
            (found,) = torch.autograd.grad(read, leaf, gradient[positions.to(gradient.device)].to(read))
        return found

    def box_weights(
        self, ex: Explanation, seen: Seen, token: int, query: str | None = None, image: int = 0
    ) -> BoxWeights:
        """Weigh the boxes of a text query by their gradient alignment with a token.

        Args:
            ex: An explanation by this model.
            seen: The image.
            token: The index of the token in the explanation.
            query: The text query. The default is "a photo of a WORD", with the word of the token.
            image: The index of the image in the prompt.
        """
        query = f"a photo of a {word_of(ex.tokens, token)}" if query is None else query
        found = align(self.owl, seen.vision, query, self.direction(ex, seen, token, image))
        return replace(found, note="; ".join(filter(None, (seen.note, found.note))))

    @contextmanager
    def reading(self, seen: Sequence[Seen]) -> Iterator[None]:
        """Context manager in which the VLM reads the embeddings of these images, in this order, in place of its own."""
        with torch.inference_mode():
            features = torch.stack([self.image_embeddings(one) for one in seen])
        with given_features(self.vlm, features):
            yield

    def _pictures(self, image: Any) -> list[Seen]:
        many = image if isinstance(image, (list, tuple)) else [image]
        if not many:
            raise InputError("no image was given; a joint model needs one")
        return [self.see(one) for one in many]


def word_of(tokens: Sequence[str], token: int) -> str:
    """Return the word that contains a token of an answer, or the token itself if no word contains it."""
    start = sum(map(len, tokens[:token]))
    end = start + len(tokens[token])
    for match in re.finditer(r"[\w'-]+", "".join(tokens)):
        if match.start() < end and match.end() > start:
            return match.group()
    return tokens[token].strip()


def _tile(vlm: VLM, vision: Vision) -> Tile:
    _, (layout,), _ = vlm.prompts.prepare([[vision.picture]], ["?"])
    return single_tile(layout.images[0].tiles)
