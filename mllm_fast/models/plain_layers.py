"""Decoder layers that are the plain ones, as weights: what `kernels.DecoderLayers` can run in place of the modules.

The modules are found by their usual names (those of Llama and of the many models that share them), and each is checked
by what it computes. Whether the layers compute nothing beside them is for the caller to check, by running both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from ..kernels.decoder_layers import DecoderLayers, LayerWeights, LinearWeights, NormWeights
from .linears import is_plain
from .norms import norm_of
from .text_model import TextModel

_LINEAR = ("query", "key", "value", "output", "gate", "up", "down")
_NAMES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj",
)  # fmt: skip
_NORMS = ("input_layernorm", "post_attention_layernorm")
_IDLE = "transformers.utils.output_capturing"  # the module of these hooks
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


class NotPlainError(Exception):
    """A part of the decoder is not what the plain layers have in its place; the message says which."""


@dataclass(frozen=True)
class PlainLayers:
    """The weights of a decoder, and the modules that they were found in.

    Attributes:
        layers, final, heads, kv_heads, activation: As in `DecoderLayers`.
        places: (the modules of the owner, name, module) of every module in the decoder.
        decoder: The decoder itself.
        listed: The modules of the list of layers.
        weights: (the parameters of the owner, name, address) of every parameter.
        forwards: The `forward` of each class of module.
    """

    layers: tuple[LayerWeights, ...]
    final: NormWeights
    heads: int
    kv_heads: int
    activation: str
    places: tuple[tuple[dict[str, Any], str, nn.Module], ...]
    decoder: nn.Module
    listed: dict[str, Any]
    weights: tuple[tuple[dict[str, Any], str, int], ...]
    forwards: dict[Any, Any]

    def kernel(self, backend: str) -> DecoderLayers:
        """Return the layers, ready to be run."""
        return DecoderLayers(self.layers, self.final, self.heads, self.kv_heads, self.activation, backend=backend)

    @property
    def in_place(self) -> bool:
        """Whether the modules and the memory of their weights are those that were found."""
        for owner, name, module in self.places:
            if owner.get(name) is not module:
                return False
        if len(self.layers) != len(self.listed):
            return False
        for owner, name, address in self.weights:
            parameter = owner.get(name)
            if parameter is None or parameter.data_ptr() != address:
                return False
        return True

    def unchanged(self, ours: Any = None) -> bool:
        """Return whether the modules are still those that the weights were found in, without hooks or other forwards.

        It is asked before every pass, so it looks at no more than it must.

        Args:
            ours: The function of the `forward` attributes that this library itself sets on modules.
        """
        if not self.in_place:
            return False
        if hooks._global_forward_hooks or hooks._global_forward_pre_hooks or watched(self.decoder, ours):
            return False
        for _, _, module in self.places:
            if watched(module, ours):
                return False
        return all(cls.forward is forward for cls, forward in self.forwards.items())


@torch.no_grad()
def plain_layers(text: TextModel, scales: Sequence[float]) -> PlainLayers:
    """Return the weights of the layers of a text model.

    Args:
        text: The text model.
        scales: The factor of the scores of each layer.

    Raises:
        NotPlainError: A part is not what the plain layers have in its place.
    """
    sites = text.sites
    if text.findings.others or len({(s.num_heads, s.num_kv_heads, s.head_dim, s.key_dim) for s in sites}) > 1:
        raise NotPlainError("the layers differ from one another")
    first = sites[0]
    if first.key_dim != first.head_dim or any(s.cache != i for i, s in enumerate(sites)):
        raise NotPlainError("keys and values differ in size, or layers share them")
    if any(s.gated or s.post_norm or s.multiplier != 1 for s in sites):
        raise NotPlainError("something lies between attention and the residual stream")
    layers, activations = [], set()
    for layer, scale in zip(text.layers, scales, strict=True):
        linear = dict(zip(_LINEAR, (_linear(layer, name) for name in _NAMES), strict=True))
        before, after = (_norm(_part(layer, name), name, text.width) for name in _NORMS)
        query_norm, key_norm = (_head_norm(layer, name, first.head_dim) for name in _HEAD_NORMS)
        activations.add(_activation(_part(layer, "mlp.act_fn")))
        layers.append(LayerWeights(before, query_norm, key_norm, after, **linear, scale=scale))
    if len(activations) > 1:
        raise NotPlainError(f"the layers have several activations, {', '.join(sorted(activations))}")
    places = _inside(text.decoder)
    listed = next(owner for owner, _, module in places if module is text.layers[0])
    embedding = text.decoder.get_input_embeddings()
    weights = tuple(
        (module._parameters, name, parameter.data_ptr())
        for _, _, module in places
        if module is not embedding  # which is called as it is
        for name, parameter in module._parameters.items()
        if parameter is not None
    )
    return PlainLayers(
        layers=tuple(layers),
        final=_norm(text.norm, "norm", text.width),
        heads=first.num_heads,
        kv_heads=first.num_kv_heads,
        activation=activations.pop(),
        places=tuple(places),
        decoder=text.decoder,
        listed=listed,
        weights=weights,
        forwards={type(module): type(module).forward for _, _, module in places},
    )


def watched(module: nn.Module, ours: Any = None) -> bool:
    """Return whether somebody follows the calls of a module, by a hook or by a `forward` of its own.

    The hooks that transformers leaves behind where hidden states were asked for once do nothing in other calls.

    Args:
        module: The module.
        ours: The function of the `forward` that this library itself sets on modules, which does not count.
    """
    own = module.__dict__.get("forward")
    if module._forward_pre_hooks or (own is not None and getattr(own, "func", None) is not ours):
        return True
    return bool(module._forward_hooks) and any(one.__module__ != _IDLE for one in module._forward_hooks.values())


def _inside(module: nn.Module) -> list[tuple[dict[str, Any], str, nn.Module]]:
    """Return the modules below one, each with the modules of its owner and its name."""
    return [
        (owner._modules, name, child)
        for owner in module.modules()
        for name, child in owner._modules.items()
        if child is not None
    ]


def _part(layer: nn.Module, name: str) -> Any:
    try:
        return layer.get_submodule(name)
    except AttributeError:
        raise NotPlainError(f"a {type(layer).__name__} has no {name}") from None


def _linear(layer: nn.Module, name: str) -> LinearWeights:
    module = _part(layer, name)
    if not is_plain(module) or module.weight.device.type == "meta" or not module.weight.is_contiguous():
        raise NotPlainError(f"{name} is no plain linear layer in memory")
    return LinearWeights(module.weight.detach(), None if module.bias is None else module.bias.detach())


def _norm(module: nn.Module, name: str, width: int) -> NormWeights:
    found = norm_of(module, name, width)
    if found.kind != "rms" or found.bias is not None or found.gain is None or found.one_plus:
        raise NotPlainError(f"{name} is no root mean square norm with a gain")
    return NormWeights(found.gain, found.eps)


def _head_norm(layer: nn.Module, name: str, width: int) -> NormWeights:
    try:
        module = layer.get_submodule(name)
    except AttributeError:
        return NormWeights(None)
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.shape != (width,):
        raise NotPlainError(f"{name} is no norm of each head")
    return _norm(module, name, width)


def _activation(module: nn.Module) -> str:
    """Return the name of an activation, by what it computes."""
    x = torch.linspace(-6, 6, 97, dtype=torch.float64)
    known = {"silu": nn.functional.silu(x), "gelu_tanh": nn.functional.gelu(x, approximate="tanh")}
    found = module(x)
    for name, wanted in known.items():
        if torch.allclose(found, wanted, rtol=1e-9, atol=1e-9):
            return name
    raise NotPlainError(f"{type(module).__name__} is neither silu nor gelu by tanh")
