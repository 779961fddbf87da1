"""The text part of a model: its decoder layers, output projections, final norm and unembedding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from ..core.errors import InputError
from ..kernels import Unembedding, weight_state
from .adapter import Adapter, detached
from .offload import weight_of

_STACKED_BYTES = 1 << 25  # output projections up to this size are kept together in one copy


@dataclass(frozen=True)
class TextModel:
    """The text part of one model, found through its adapter.

    Attributes:
        adapter: The adapter of the model.
        config: The config of the decoder.
        decoder: The decoder.
        layers: The decoder layers.
        norm: The final norm.
        head: The unembedding.
        outputs: The output projection of each layer.
        num_heads: The number of query heads.
        head_dim: The size of a head.
    """

    adapter: Adapter
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
        """Return O_j, [hidden size, head dim], a view of the output projection's weight."""
        return self._of_heads(layer)[1][head]

    def projections(self, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield O_j of all heads, transposed, for one range of layers after another.

        A small model yields all layers at once, from a copy that is cached. A larger one yields one layer at a time.

        Yields:
            The slice of layers, and their O_j as [layers, heads, head dim, hidden size].
        """
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
        """Return the O_j of a layer, stacked and one by one.

        They are cached while the weight stays in place: in a small model, making the views takes as long as using them.
        """
        weight: Any = self.outputs[layer].weight
        kept = self._views.get(layer)
        if kept is not None and kept[0] is weight and kept[1] == weight.data_ptr():
            return kept[2:]
        whole = weight_of(self.outputs[layer]).unflatten(1, (self.num_heads, self.head_dim)).permute(1, 2, 0)
        each = [one.mT for one in whole]
        if weight.device.type == "meta":  # keep only the last offloaded layer: callers ask for its heads in turn
            for other in [i for i in self._views if self.outputs[i].weight.device.type == "meta"]:
                del self._views[other]
        self._views[layer] = weight, weight.data_ptr(), whole, each
        return whole, each

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits [..., V] for the final norm's output [..., d]."""
        logits = self.head(hidden)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def unembedding(self) -> Unembedding:
        """Return the final norm and the unembedding, as views of the weights."""
        norm = self.adapter.final_norm(self.norm)
        return Unembedding(
            weight=weight_of(self.head),
            gain=norm.gain,
            norm_bias=norm.bias,
            bias=detached(getattr(self.head, "bias", None)),
            eps=norm.eps,
            kind=norm.kind,
            softcap=getattr(self.config, "final_logit_softcapping", None),
        )


def text_model(model: nn.Module, adapter: Adapter) -> TextModel:
    """Return the text part of `model`, found by the paths in the adapter.

    Raises:
        InputError: An output projection is not a plain linear layer with weights of 16 bits or more.
    """
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
        adapter=adapter,
        config=decoder.config,
        decoder=decoder,
        layers=layers,
        norm=decoder.norm,
        head=attrgetter(adapter.unembedding)(model),
        outputs=tuple(getattr(module, adapter.output) for module in attention),
        num_heads=decoder.config.num_attention_heads,
        head_dim=attention[0].head_dim,
    )
