"""What a model computes on its own eager attention, layer by layer, and the scores that follow from it.

Nothing here comes from the package: the parts are found by the names that transformers gives them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import sdpa_mask

ATTENTION = ("self_attn", "attention", "self_attention")
OUTPUT = ("o_proj", "out_proj", "dense")
Close = Callable[[int, int], Tensor]  # (rows, keys) -> bool [rows, keys], True where a pair is closed


def named(owner: nn.Module, names: tuple[str, ...]) -> Any:
    return next((getattr(owner, name) for name in names if hasattr(owner, name)), None)


@dataclass
class Parts:
    """The parts of a model by their names."""

    model: Any
    decoder: Any
    layers: list[nn.Module]
    attention: list[Any]  # one a layer, or None
    norm: nn.Module
    head: nn.Module
    softcap: float | None = None  # of the logits; set by `run`, as some releases leave it out

    @classmethod
    def of(cls, model: Any) -> Parts:
        decoder = next(
            module
            for name, module in model.named_modules()
            if hasattr(module, "layers") and hasattr(module, "embed_tokens")
        )
        layers = list(decoder.layers)
        attention = [named(layer, ATTENTION) for layer in layers]
        attention = [one if one is not None and named(one, OUTPUT) is not None else None for one in attention]
        norm = named(decoder, ("norm", "embedding_norm", "ln_f"))
        return cls(model, decoder, layers, attention, norm, model.get_output_embeddings())


@dataclass
class Seen:
    """One pass: by layer the residual input, what follows the attention, the output projection's input, and so on."""

    inputs: dict[int, Tensor] = field(default_factory=dict)
    after: dict[int, list[Tensor]] = field(default_factory=dict)
    given: dict[int, Tensor] = field(default_factory=dict)  # of the output projection, [R, H * Dv]
    read: dict[int, Tensor] = field(default_factory=dict)  # the attention module's input, [R, d]
    wrote: dict[int, Tensor] = field(default_factory=dict)  # the attention module's output, [R, d]
    alpha: dict[int, Tensor] = field(default_factory=dict)  # [H, R, N]
    value: dict[int, Tensor] = field(default_factory=dict)  # [H, N, Dv]
    final: Tensor = field(default_factory=lambda: torch.empty(0))
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    cache: Any = None


class Double(TorchFunctionMode):
    """Inside, transformers' code computes in float64 where it asks for float32: norms, softmax, routers, angles.

    Otherwise a difference of one rounding of float64 becomes one of float32.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if _asks(sys._getframe(1)):
            func = Tensor.double if func is Tensor.float else func
            args = tuple(torch.float64 if one is torch.float32 else one for one in args)
            given = {name: torch.float64 if one is torch.float32 else one for name, one in given.items()}
        return func(*args, **given)


def _asks(frame: Any) -> bool:
    """Whether the call comes from a model of transformers."""
    while frame is not None and "/torch/" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None and "/transformers/" in frame.f_code.co_filename


class Eager:
    """Runs a model on its own eager attention in full float64, with pairs closed in the text part."""

    def __init__(self, parts: Parts, close: Close | None = None, seen: Seen | None = None):
        self.parts, self.close, self.seen = parts, close, seen
        self.text = {module: i for i, module in enumerate(parts.attention) if module is not None}
        configs = {id(m.config): m.config for m in parts.model.modules() if hasattr(m, "config")}
        self.before = [
            (one, one._attn_implementation) for one in configs.values() if hasattr(one, "_attn_implementation")
        ]

    def __enter__(self) -> Eager:
        AttentionInterface.register("oracle", self._forward)
        AttentionMaskInterface.register("oracle", _mask)
        self.parts.model.set_attn_implementation("oracle")
        return self

    def __exit__(self, *error: Any) -> None:
        for config, implementation in self.before:
            config._attn_implementation = implementation
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop("oracle", None)

    def _forward(self, module, query, key, value, attention_mask, scaling=None, **options):
        own = sys.modules[type(module).__module__].eager_attention_forward
        rows, keys = query.shape[2], key.shape[2]
        layer = self.text.get(module)
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, -1e300)
        if layer is not None and self.close is not None:
            bias = torch.zeros(rows, keys, dtype=query.dtype).masked_fill(self.close(rows, keys), -1e300)
            attention_mask = bias if attention_mask is None else attention_mask + bias
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        output, alpha = own(module, query, key, value, attention_mask, scaling=scaling, **options)
        if layer is not None and self.seen is not None:
            self.seen.alpha[layer] = alpha[0]
            self.seen.value[layer] = value[0].repeat_interleave(query.shape[1] // value.shape[1], 0)
        return output, alpha


def _mask(*args: Any, **options: Any) -> Tensor:
    return sdpa_mask(*args, **{**options, "allow_is_causal_skip": False})


def full_cache(parts: Parts) -> DynamicCache:
    cache = DynamicCache(config=parts.decoder.config)
    cache.layers = [DynamicLayer() if getattr(one, "is_sliding", False) else one for one in cache.layers]
    return cache


@torch.no_grad()
def run(parts: Parts, inputs: dict, close: Close | None = None) -> Seen:
    """Run one pass on eager attention, and return everything that it computed."""
    seen, handles = Seen(), []

    def first(args: tuple, kwargs: dict) -> Any:
        return args[0] if args else kwargs.get("hidden_states")

    for i, (layer, attention) in enumerate(zip(parts.layers, parts.attention, strict=True)):
        handles.append(
            layer.register_forward_pre_hook(
                lambda _, a, k, i=i: seen.inputs.__setitem__(i, first(a, k)[0].clone()), with_kwargs=True
            )
        )
        if attention is None:
            continue
        output = named(attention, OUTPUT)
        handles.append(output.register_forward_pre_hook(lambda _, a, i=i: seen.given.__setitem__(i, a[0][0].clone())))
        handles.append(
            attention.register_forward_hook(
                lambda _, a, out, i=i: seen.wrote.__setitem__(i, (out[0] if isinstance(out, tuple) else out)[0].clone())
            )
        )
        handles.append(
            attention.register_forward_pre_hook(
                lambda _, a, k, i=i: seen.read.__setitem__(i, first(a, k)[0].clone()), with_kwargs=True
            )
        )
        for child in layer.children():
            if child is not attention:
                handles.append(
                    child.register_forward_pre_hook(
                        lambda _, a, k, i=i: (
                            seen.after.setdefault(i, []).append(first(a, k)[0].clone()) if i in seen.wrote else None
                        ),
                        with_kwargs=True,
                    )
                )
    handles.append(parts.norm.register_forward_pre_hook(lambda _, a: setattr(seen, "final", a[0][0].clone())))
    try:
        with Eager(parts, close, seen):
            output = parts.model(**inputs, use_cache=True)
    finally:
        for handle in handles:
            handle.remove()
    cap = getattr(parts.model.config.get_text_config(), "final_logit_softcapping", None)
    parts.softcap = None if torch.allclose(parts.head(parts.norm(seen.final)), output.logits[0]) else cap
    seen.logits, seen.cache = output.logits[0], output.get("cache", output.get("past_key_values"))
    return seen


def added(seen: Seen, layer: int) -> Tensor:
    """What the attention of a layer adds to the residual stream, [R, d]."""
    wrote, before = seen.wrote[layer], seen.inputs[layer]
    for after in seen.after.get(layer, []):
        if torch.equal(after, seen.read[layer]):
            return wrote  # a block whose attention and MLP read the same rows
        if after.shape == wrote.shape and not torch.equal(after, wrote) and not torch.equal(after, before):
            return after - before
    return wrote


def writes(parts: Parts, seen: Seen, layer: int, row: int) -> tuple[Tensor, Tensor]:
    """The write of each head, [H, d], and of each position of each head, [H, N, d], to a row's residual stream.

    A norm behind the attention is taken with the statistics of the row, so that it is one factor a channel.
    """
    attention = parts.attention[layer]
    output: Any = named(attention, OUTPUT)
    heads = len(seen.alpha[layer])
    weight = output.weight.unflatten(1, (heads, -1))  # [d, H, Dv]
    given = seen.given[layer][row].unflatten(0, (heads, -1))
    raw = torch.einsum("ehd,hd->he", weight, given)
    attended = (seen.alpha[layer][:, row, :, None] * seen.value[layer]).sum(1)
    gate = torch.where(attended == 0, 0, given / attended)
    each = torch.einsum("ehd,hnd->hne", weight, seen.alpha[layer][:, row, :, None] * seen.value[layer] * gate[:, None])
    whole = raw.sum(0) + (0 if output.bias is None else output.bias)
    factor = added(seen, layer)[row] / whole
    return raw * factor, each * factor


def log_probs(parts: Parts, rows: Tensor, final: Tensor | None = None) -> Tensor:
    """log p of every word for residual rows [..., d]: with their own norm statistics, or with those of `final` [d]."""
    norm: Any = parts.norm
    if final is None:
        hidden = norm(rows)
    else:
        bias = getattr(norm, "bias", None)
        bias = torch.zeros_like(final) if not isinstance(bias, Tensor) else bias
        centred = _is_layer_norm(norm, len(final))
        mean = final.mean() if centred else 0.0
        hidden = (rows - mean) * ((norm(final[None])[0] - bias) / (final - mean)) + bias
    logits = parts.head(hidden)
    cap = parts.softcap
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return torch.log_softmax(logits, -1)


def _is_layer_norm(norm: nn.Module, width: int) -> bool:
    """A norm that subtracts the mean does not see a constant that is added to its rows."""
    rows = torch.randn(2, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.allclose(norm(rows), norm(rows + 1), atol=1e-4)
