"""What differs between the architectures, as data. To add one: an entry in ADAPTERS and, where its
processor lays image tokens out in a new way, a function that says how."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from ..core.errors import InputError
from ..core.layout import Tile
from ..kernels import Unembedding, weight_state
from .offload import weight_of

_STACKED_BYTES = 1 << 25  # of the output projections of a model that keeps them together
Tiling = tuple[tuple[Tile, ...], tuple[int, int]]  # tiles in token order, and (rows, cols) of the canvas


@dataclass(frozen=True)
class Adapter:
    """Where a model keeps its parts (dotted paths from the model), and how its image tokens lie.

    `tiles(processor, inputs, index, size)`: the tiling of the index-th image, (width, height) = size.
    """

    model_type: str
    text_types: tuple[str, ...]
    tiles: Callable[[Any, Any, int, tuple[int, int]], Tiling]
    decoder: str = "model.language_model"
    unembedding: str = "lm_head"
    attention: str = "self_attn"  # from a layer
    output: str = "o_proj"  # from the attention module
    state: tuple[str, ...] = ()  # what a model keeps of the sequence at hand, outside the cache; dotted paths
    # how image embeddings [images, tokens, d] are handed to the decoder; None where a picture's size sets their number
    features: Callable[[torch.Tensor], Any] | None = None


@dataclass(frozen=True)
class TextModel:
    """The text part of one model, found through its adapter. Heads are query heads."""

    config: Any
    decoder: nn.Module
    layers: tuple[nn.Module, ...]
    norm: nn.Module
    head: Any
    outputs: tuple[nn.Linear, ...]
    num_heads: int
    head_dim: int
    _views: dict[int, tuple[Any, int, torch.Tensor, list[torch.Tensor]]] = field(default_factory=dict, repr=False)
    _stacked: dict[str, Any] = field(default_factory=dict, repr=False)

    def projection(self, layer: int, head: int) -> torch.Tensor:
        """O_j: [hidden size, head dim], a view of the output projection's weight."""
        return self._of_heads(layer)[1][head]

    def projections(self, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """O_j of all heads, transposed, [layers, heads, head dim, hidden size], some layers at a time: of a small model
        all of them, from one copy that is kept; else one after another."""
        count = len(self.outputs)
        first: Any = self.outputs[0].weight
        elsewhere = any(output.weight.device.type == "meta" for output in self.outputs)
        if elsewhere or count * first.numel() * dtype.itemsize > _STACKED_BYTES:
            for layer in range(count):
                yield slice(layer, layer + 1), self._of_heads(layer)[0].to(device=device, dtype=dtype)[None]
            return
        state = device, dtype, *(weight_state(output.weight) for output in self.outputs)
        if self._stacked.get("state") != state:
            each = [self._of_heads(layer)[0].to(device=device, dtype=dtype) for layer in range(count)]
            self._stacked.update(state=state, weights=torch.stack(each))
        yield slice(0, count), self._stacked["weights"]

    def _of_heads(self, layer: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Kept while the weight stays where it is: of a small model, making views takes as long as using them."""
        weight: Any = self.outputs[layer].weight
        kept = self._views.get(layer)
        if kept is not None and kept[0] is weight and kept[1] == weight.data_ptr():
            return kept[2:]
        whole = weight_of(self.outputs[layer]).unflatten(1, (self.num_heads, self.head_dim)).permute(1, 2, 0)
        each = [one.mT for one in whole]
        if weight.device.type == "meta":  # read in: the last one alone is kept, its heads are asked for in turn
            for other in [i for i in self._views if self.outputs[i].weight.device.type == "meta"]:
                del self._views[other]
        self._views[layer] = weight, weight.data_ptr(), whole, each
        return whole, each

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of the final norm's output [..., d]: [..., V]."""
        logits = self.head(hidden)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def unembedding(self) -> Unembedding:
        """The final norm and the unembedding, views of the weights."""
        norm: Any = self.norm
        layer = isinstance(norm, nn.LayerNorm)
        if not layer and not (hasattr(norm, "variance_epsilon") and hasattr(norm, "weight")):
            raise InputError(
                f"the final norm is a {type(norm).__name__}: scores know LayerNorm, and RMSNorm with a weight and a"
                " variance_epsilon; see CONTRIBUTING.md, 'Add an architecture'"
            )
        return Unembedding(
            weight=weight_of(self.head),
            gain=weight_of(norm),
            norm_bias=_detached(getattr(norm, "bias", None)),
            bias=_detached(getattr(self.head, "bias", None)),
            eps=norm.eps if layer else norm.variance_epsilon,
            kind="layer" if layer else "rms",
            softcap=getattr(self.config, "final_logit_softcapping", None),
        )


def _detached(parameter: torch.Tensor | None) -> torch.Tensor | None:
    return None if parameter is None else parameter.detach()


def find_adapter(model: nn.Module) -> Adapter:
    """The adapter of a model.

    Raises:
        InputError: the architecture, or the language model inside it, is not listed.
    """
    config: Any = model.config
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in ADAPTERS:
        hint = "" if hasattr(config, "vision_config") else " (it has no vision part: a text-only model?)"
        raise InputError(
            f"the architecture {kind!r} is not supported{hint}; supported are {', '.join(ADAPTERS)};"
            " to add one, see CONTRIBUTING.md, 'Add an architecture'"
        )
    adapter = ADAPTERS[kind]
    text = config.get_text_config().model_type
    if text not in adapter.text_types:
        raise InputError(
            f"{kind} with a language model of type {text!r} is not supported; supported are"
            f" {', '.join(adapter.text_types)}; to add one, see CONTRIBUTING.md, 'Add an architecture'"
        )
    return adapter


def text_model(model: nn.Module, adapter: Adapter) -> TextModel:
    """The parts of `model` that the adapter names."""
    decoder: Any = attrgetter(adapter.decoder)(model)
    layers = tuple(decoder.layers)
    attention = [getattr(layer, adapter.attention) for layer in layers]
    for module in attention:
        output = getattr(module, adapter.output)
        if type(output) is not nn.Linear or not output.weight.is_floating_point() or output.weight.itemsize < 2:
            raise InputError(
                f"the output projections are {type(output).__name__} of {output.weight.dtype}: an explanation needs"
                " plain weights of 16 bits or more; load the model unquantised, and merge adapters into it"
            )
    return TextModel(
        config=decoder.config,
        decoder=decoder,
        layers=layers,
        norm=decoder.norm,
        head=attrgetter(adapter.unembedding)(model),
        outputs=tuple(getattr(module, adapter.output) for module in attention),
        num_heads=decoder.config.num_attention_heads,
        head_dim=attention[0].head_dim,
    )


def _llava_tiles(processor: Any, inputs: Any, index: int, size: tuple[int, int]) -> Tiling:
    if getattr(processor.image_processor, "do_pad", False):
        raise InputError("the processor pads pictures to squares (do_pad), which is not supported; set it to False")
    height, width = inputs["pixel_values"].shape[-2:]
    patch = processor.patch_size
    box = _cropped_box(processor.image_processor, size, (width, height))
    return (Tile(height // patch, width // patch, box),), (1, 1)


def _cropped_box(images: Any, size: tuple[int, int], seen: tuple[int, int]) -> tuple[float, float, float, float]:
    """The part of the original picture that is left after "resize the short edge, crop the centre"."""
    width, height = size
    edge = images.size.get("shortest_edge") if getattr(images, "do_resize", False) else None
    if not getattr(images, "do_center_crop", False):
        return 0.0, 0.0, float(width), float(height)
    if edge is not None:
        short, long = min(width, height), max(width, height)
        resized = (edge, int(edge * long / short)) if width <= height else (int(edge * long / short), edge)
    elif getattr(images, "do_resize", False):
        resized = (images.size["width"], images.size["height"])
    else:
        resized = (width, height)
    # as transformers' center_crop: the odd pixel falls to the right and below
    left, top = (resized[0] - seen[0]) // 2, (resized[1] - seen[1]) // 2
    x, y = width / resized[0], height / resized[1]
    return left * x, top * y, (left + seen[0]) * x, (top + seen[1]) * y


def _internvl_tiles(processor: Any, inputs: Any, index: int, size: tuple[int, int]) -> Tiling:
    side = math.isqrt(processor.image_seq_length)
    width, height = size
    images = processor.image_processor
    crop = _internvl_defaults(processor).get("crop_to_patches", images.crop_to_patches)
    whole = (0.0, 0.0, float(width), float(height))
    if not crop or images.max_patches <= 1:
        return (Tile(side, side, whole),), (1, 1)
    # the processor's own choice of canvas, from the module that makes it
    choose = sys.modules[type(images).__module__].get_optimal_tiled_canvas  # type: ignore[attr-defined]
    tile_size = (images.size["height"], images.size["width"])
    cols, rows = choose((height, width), tile_size, images.min_patches, images.max_patches)
    tiles = [
        Tile(side, side, (c * width / cols, r * height / rows, (c + 1) * width / cols, (r + 1) * height / rows))
        for r in range(rows)
        for c in range(cols)
    ]
    if len(tiles) > 1:
        tiles.append(Tile(side, side, whole))  # the thumbnail
    return tuple(tiles), (rows, cols)


def _internvl_defaults(processor: Any) -> dict[str, Any]:
    """What the processor asks of its image processor; older releases keep it elsewhere."""
    found = getattr(processor, "images_kwargs", None)
    if found is None:
        from transformers.models.internvl import processing_internvl

        found = processing_internvl.InternVLProcessorKwargs._defaults["images_kwargs"]
    return found


def _qwen_tiles(processor: Any, inputs: Any, index: int, size: tuple[int, int]) -> Tiling:
    frames, rows, cols = (int(n) for n in inputs["image_grid_thw"][index])
    merge = processor.image_processor.merge_size
    if frames != 1:
        raise InputError(f"image {index} has {frames} frames; give one still picture")
    width, height = size
    return (Tile(rows // merge, cols // merge, (0.0, 0.0, float(width), float(height))),), (1, 1)


ADAPTERS = {
    adapter.model_type: adapter
    for adapter in (
        Adapter("llava", ("llama", "mistral", "qwen2"), _llava_tiles, features=list),
        Adapter("internvl", ("qwen2", "llama"), _internvl_tiles, features=lambda given: given),
        Adapter("qwen2_5_vl", ("qwen2_5_vl_text",), _qwen_tiles, state=("model.rope_deltas",)),
    )
}
