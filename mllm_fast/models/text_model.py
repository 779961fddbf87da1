"""The text part of a model: its decoder layers, attention sites, final norm and unembedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import InputError
from ..core.split import Split, is_sharded, local
from ..kernels import Unembedding, weight_state
from .findings import Findings, Site
from .linears import compute_dtype, device_of_linear, effective_weight, is_plain, linear_state
from .norms import Norm, norm_of, vector_of
from .offload import device_of
from .output_weights import OutputWeights
from .probe import find_parts
from .tensor_parallel import split_of


@dataclass(frozen=True)
class TextModel:
    """The text part of one model. Its parts were found by what they compute; see `models.probe`.

    A site is the attention of one decoder layer. A hybrid model has layers without one.

    Attributes:
        findings: The parts as paths and numbers.
        config: The config of the decoder.
        decoder: The decoder.
        layers: The decoder layers.
        sites: The attention sites, in the order of the layers.
        attention: The attention module of each site.
        outputs: The output projection of each site.
        post_norms: The norm between the output projection and the residual stream of each site, or None.
        norm: The final norm.
        head: The unembedding.
        width: The size d of the residual stream.
        num_heads: The largest number of query heads of a site, in all processes together.
        head_dim: The largest size of a value.
        site_layers: The number of each site's layer.
        by_layer: The index of each layer's site, by the number of the layer.
        by_module: The index of each site, by its attention module.
        split: What each process holds of a model that is split over processes; None if this one holds all of it.
        kept: What other rooms make of this model once, by their names. It is freed with the model.
    """

    findings: Findings
    config: Any
    decoder: Any
    layers: tuple[nn.Module, ...]
    sites: tuple[Site, ...]
    attention: tuple[nn.Module, ...]
    outputs: tuple[Any, ...]
    post_norms: tuple[nn.Module | None, ...]
    norm: nn.Module
    head: Any
    width: int
    num_heads: int
    head_dim: int
    site_layers: tuple[int, ...]
    by_layer: dict[int, int]
    by_module: dict[nn.Module, int]
    split: Split | None = None
    kept: dict[str, Any] = field(default_factory=dict, repr=False)
    _stacked: dict[str, Any] = field(default_factory=dict, repr=False)
    _norms: dict[str, tuple[Any, Norm]] = field(default_factory=dict, repr=False)

    @cached_property
    def writes(self) -> OutputWeights:
        """What one number of a head's output adds to the residual stream."""
        heads = len(self.heads)
        return OutputWeights(
            self.sites, self.outputs, self.post_norms, self.width, heads, self.head_dim, self.post_norm
        )

    @cached_property
    def inference(self) -> Callable[[], AbstractContextManager[Any]]:
        """What disables gradients: torch's inference mode, or no_grad if quantised layers cannot run in that."""
        linear = [module for module in (*self.decoder.modules(), self.head) if hasattr(module, "in_features")]
        others = [one for one in linear if not (is_plain(one) or is_sharded(getattr(one, "weight", None)))]
        kinds = {(type(one), type(getattr(one, "weight", None))): one for one in others}
        try:
            for one in kinds.values():
                row = torch.zeros(1, one.in_features, device=device_of_linear(one), dtype=compute_dtype(one))
                with torch.inference_mode():
                    one(row)
        except RuntimeError:  # torch's own error about version counters
            return torch.no_grad
        return torch.inference_mode

    @property
    def heads(self) -> range:
        """The query heads that this process holds."""
        return range(self.num_heads) if self.split is None else self.split.my_heads

    @property
    def shares_keys(self) -> bool:
        """Whether some layers read the keys and values of others."""
        cached = [site.cache for site in self.sites if site.cache is not None]
        return len(set(cached)) < len(cached)

    @property
    def resumable(self) -> bool:
        """Whether keys and values alone are what the model needs of the positions before a pass."""
        return not self.findings.others and all(site.cache is not None for site in self.sites)

    def site(self, layer: int) -> int:
        """Return the index of a layer's site.

        Raises:
            InputError: The layer has no attention.
        """
        if layer not in self.by_layer:
            raise InputError(
                f"layer {layer} has no attention heads (it is a {self.findings.others.get(layer, 'layer')}); layers"
                f" with attention are {', '.join(map(str, self.by_layer))}"
            )
        return self.by_layer[layer]

    def check_writes(self) -> None:
        """Raise InputError if the writes of a site are not what it adds to the residual stream."""
        for site in self.sites:
            if site.problem:
                raise InputError(f"this model cannot be explained: in layer {site.layer} {site.problem}")
        if len({site.num_heads for site in self.sites}) > 1:
            raise InputError("this model cannot be explained: its layers have different numbers of heads")

    def projection(self, site: int, head: int) -> Tensor:
        """Return O_j of a head of this process, counted from its first, [hidden size, head dim]."""
        return self.writes.projection(site, head)

    def post_norm(self, site: int) -> Norm | None:
        """Return the norm between a site's output projection and the residual stream, or None."""
        module = self.post_norms[site]
        return (
            None
            if module is None
            else self._norm(module, f"the norm behind the attention of layer {self.sites[site].layer}")
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., V] for the final norm's output [..., d]."""
        return self.scaled(self.head(hidden))

    def scaled(self, logits: Tensor) -> Tensor:
        """Return the logits for what the unembedding gives: times the model's factor, under its soft cap."""
        found = self.findings
        logits = logits if found.logit_scale == 1 else logits * found.logit_scale
        return logits if found.softcap is None else found.softcap * torch.tanh(logits / found.softcap)

    def unembedding(self) -> Unembedding:
        """Return the final norm and the unembedding in the form that the kernels take.

        Of a model that is split over processes it has the words of this process.
        """
        state = linear_state(self.head), *(weight_state(part) for part in self.norm.parameters())
        if self._stacked.get("head") != state:
            self._stacked.update(head=state, unembedding=self._unembedding())
        return self._stacked["unembedding"]

    def _unembedding(self) -> Unembedding:
        norm, scale = self.final_norm(), self.findings.logit_scale
        gain, norm_bias, bias = norm.gain, norm.bias, local(vector_of(self.head, "bias"))
        if scale != 1:  # a factor of the logits is one of the gain and of both biases
            gain = torch.full((self.width,), scale, device=device_of(self.norm)) if gain is None else scale * gain
            norm_bias, bias = (None if part is None else scale * part for part in (norm_bias, bias))
        return Unembedding(
            weight=effective_weight(self.head),
            gain=gain,
            norm_bias=norm_bias,
            bias=bias,
            eps=norm.eps,
            kind=norm.kind,
            softcap=self.findings.softcap,
        )

    def _norm(self, module: nn.Module, name: str) -> Norm:
        """Return what a norm computes; it is run the first time, and read again when its weights change."""
        state = tuple(weight_state(parameter) for parameter in module.parameters())
        kept = self._norms.get(name)
        if kept is None or kept[0] != state:
            norm = norm_of(module, name, self.width) if kept is None else kept[1].read(module)
            self._norms[name] = kept = state, norm
        return kept[1]

    def final_norm(self) -> Norm:
        """Return what the final norm computes."""
        return self._norm(self.norm, "the final norm")


def text_model(model: Any, ids: Sequence[int]) -> TextModel:
    """Return the text part of a model.

    Args:
        model: A model of transformers that generates text.
        ids: Token ids of some ordinary text, on which the model is run once.

    Raises:
        InputError: A part cannot be found.
    """
    found = find_parts(model, ids)
    get = model.get_submodule
    decoder: Any = get(found.decoder)
    head: Any = get(found.head)
    attention = tuple(get(site.attention) for site in found.sites)
    outputs = tuple(get(site.output) if site.output else None for site in found.sites)
    heads = max(site.num_heads for site in found.sites)
    kv_heads = getattr(decoder.config, "num_key_value_heads", None) or heads
    every = getattr(decoder.config, "num_attention_heads", None)
    split = split_of(outputs, head, heads, kv_heads, every)
    if split is None and (getattr(model, "_tp_size", None) or 1) > 1:
        raise InputError("this model is divided between processes in a way that is not known: load it with tp='auto'")
    if split is not None and (found.others or len({(site.num_heads, site.num_kv_heads) for site in found.sites}) > 1):
        raise InputError(
            "a model that is split over processes has attention with the same number of heads in every layer; this one"
            " has not: load it on one device, or over several with device_map"
        )
    return TextModel(
        findings=found,
        config=decoder.config,
        decoder=decoder,
        layers=tuple(get(found.layers)),
        sites=found.sites,
        attention=attention,
        outputs=outputs,
        post_norms=tuple(get(site.post_norm) if site.post_norm else None for site in found.sites),
        norm=get(found.norm),
        head=head,
        width=int(head.in_features if hasattr(head, "in_features") else head.weight.shape[1]),
        num_heads=heads if split is None else split.heads[-1].stop,
        head_dim=max(site.head_dim for site in found.sites),
        site_layers=tuple(site.layer for site in found.sites),
        by_layer={site.layer: i for i, site in enumerate(found.sites)},
        by_module={module: i for i, module in enumerate(attention)},
        split=split,
    )


def without_gradients(text: Callable[[Any], TextModel]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that disables gradients in the way that the model's layers can run in.

    Args:
        text: Returns the text model of the decorated function's first argument.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(owner: Any, *args: Any, **options: Any) -> Any:
            with text(owner).inference():
                return function(owner, *args, **options)

        return call

    return decorate
