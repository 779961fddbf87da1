"""Find the parts of a model by what they compute: one recorded forward pass over a short text.

The pass runs on attention that is computed here, with hooks on every module. From the tensors that go in and out
follow the decoder layers with attention, their output projections, what lies between an output projection and the
residual stream, the final norm, the unembedding and what happens to the logits. Each finding is checked by arithmetic
on the tensors of the same pass, and the logits are compared with those of the model as it is. So no list of model types
is needed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from ..core.errors import InputError, first_line
from ..core.split import is_sharded, local
from ..kernels import cast_operands, wide_type, without_autocast
from ..kernels.knockout_attention.reference import capped, weights
from .findings import Findings, Site
from .norms import relative_error
from .offload import device_of

LENGTH = 24  # tokens of the pass
_UNKNOWN_ATTENTION = ("position_bias",)  # arguments that change the attention, in ways that are not supported
_ROUNDINGS = 64  # how many roundings of the largest term a finding may be off
_SNAP = 0.01  # a factor this near to a number of the model's settings is that number
_numbers = itertools.count()


@dataclass
class _Call:
    """One call of a module: its name, first input and first output."""

    name: str
    module: nn.Module
    given: Tensor
    output: Tensor


@dataclass
class _Attended:
    """One call of the attention; `before` is how many modules had finished."""

    module: nn.Module
    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    window: int | None
    before: int


_known: dict[str, Findings] = {}


def find_parts(model: Any, ids: Sequence[int]) -> Findings:
    """Return the parts of a model, found once for all models of the same configuration and modules.

    Args:
        model: A model of transformers that generates text.
        ids: Token ids of some ordinary text, repeated or cut to the length of the pass.

    Raises:
        InputError: The pass fails, or a part cannot be found or does not compute what it seems to.
    """
    key = _structure(model)
    if key not in _known:
        repeated = list(itertools.islice(itertools.cycle(ids), LENGTH))
        _known[key] = _Probe(model).findings(torch.tensor([repeated], device=device_of(model)))
    return _known[key]


def _structure(model: Any) -> str:
    """Return a hash of the configuration, of the names and classes of the modules, and of how weights are divided."""
    config = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    modules = [
        f"{name}:{type(module).__module__}.{type(module).__qualname__}" for name, module in model.named_modules()
    ]
    dtypes = ",".join(sorted({str(parameter.dtype) for parameter in model.parameters()}))
    held = [f"{name}:{tuple(local(one).shape)}" for name, one in model.named_parameters() if is_sharded(one)]
    settings = [dtypes, str(getattr(model.config, "_attn_implementation", ""))]
    return hashlib.sha256("\n".join([config, *settings, *held, *modules]).encode()).hexdigest()


@dataclass
class _Probe:
    """One recorded pass of a model."""

    model: Any
    calls: list[_Call] = field(default_factory=list)
    attended: list[_Attended] = field(default_factory=list)
    unknown: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.names = {module: name for name, module in self.model.named_modules()}

    def findings(self, ids: Tensor) -> Findings:
        """Run the pass and return what was found."""
        with _still(self.model), torch.no_grad():
            plain = self._run(ids).logits.double()
            with self._recording():
                output = self._run(ids)
            errors = [relative_error(output.logits, plain)]
            if not errors[0] <= _loose(output.logits):
                # SDPA leaves out the mask of a text alone even where a model is not causal; eager attention does not
                with self._attention("eager"):
                    errors.append(relative_error(output.logits, self._run(ids).logits.double()))
        if not self.attended:
            raise InputError(
                f"{self._what} does not call transformers' attention interface, through which attention is recorded"
                " and knocked out; it is not supported"
            )
        if self.unknown:
            raise InputError(
                f"{self._what} has attention with {', '.join(sorted(self.unknown))}, which is not supported"
            )
        error = min(errors)
        if not error <= _loose(output.logits):
            raise InputError(
                f"{self._what} has attention that is not softmax(scale q k + mask) v (its logits differ by"
                f" {error:.2g}); it is not supported"
            )
        return self._read(output)

    @property
    def _what(self) -> str:
        return f"the model type {getattr(self.model.config, 'model_type', type(self.model).__name__)!r}"

    def _run(self, ids: Tensor) -> Any:
        try:
            return self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
        except InputError:
            raise
        except Exception as error:  # a model can raise anything
            raise InputError(
                f"{self._what} cannot read a text of {ids.shape[1]} tokens: {first_line(error)}"
            ) from error

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Run the model on `_attend` inside the block, and record every module."""
        name = f"mllm_fast_probe_{next(_numbers)}"
        AttentionInterface.register(name, self._attend)
        AttentionMaskInterface.register(name, _whole_mask)
        handles = [module.register_forward_hook(self._note, with_kwargs=True) for module in self.names]
        try:
            with self._attention(name):
                yield
        finally:
            for handle in handles:
                handle.remove()
            AttentionInterface._global_mapping.pop(name, None)
            AttentionMaskInterface._global_mapping.pop(name, None)

    @contextmanager
    def _attention(self, name: str) -> Iterator[None]:
        """Run the model on an attention implementation inside the block."""
        configs = list({id(c): c for m in self.model.modules() if (c := _attention_config(m)) is not None}.values())
        before = [config._attn_implementation for config in configs]
        try:
            for config in configs:
                config._attn_implementation = name
            yield
        finally:
            for config, implementation in zip(configs, before, strict=True):
                config._attn_implementation = implementation

    def _note(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        given = args[0] if args else next((one for one in kwargs.values() if isinstance(one, Tensor)), None)
        given = kwargs.get("hidden_states", given)
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(given, Tensor) and isinstance(first, Tensor):
            self.calls.append(_Call(self.names[module], module, given, first))

    def _attend(self, module: nn.Module, query, key, value, attention_mask, scaling=None, **kwargs):
        """Compute attention by its definition, and note what went in and out."""
        self.unknown |= {name for name in _UNKNOWN_ATTENTION if kwargs.get(name) is not None}
        query, key, value = cast_operands(query, key, value)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = _attention(query, key, value, attention_mask, scale, kwargs.get("softcap"), kwargs.get("s_aux"))
        window = kwargs.get("sliding_window")
        self.attended.append(_Attended(module, self.names[module], query, key, value, output, window, len(self.calls)))
        return output, None

    def _read(self, output: Any) -> Findings:
        lists = {one.name: _list_of(one.name) for one in self.attended}
        odd = [name for name, found in lists.items() if not found]
        if odd:
            raise InputError(f"{self._what} has attention outside its list of layers ({odd[0]}); it is not supported")
        layers = max(dict.fromkeys(lists.values()), key=list(lists.values()).count)
        modules: Any = self.model.get_submodule(layers)
        cache = [layer for layer in _cache_of(output).layers]
        sites = []
        for one in sorted((one for one in self.attended if lists[one.name] == layers), key=lambda one: one.before):
            number = int(one.name[len(layers) + 1 :].split(".")[0])
            sites.append(self._site(one, f"{layers}.{number}", number, cache))
        have = {site.layer for site in sites}
        others = {i: type(mixer_of(layer)).__name__ for i, layer in enumerate(modules) if i not in have}
        norm, head, raw = self._head(layers)
        scale, softcap = self._logits(raw, output.logits)
        state = [f"{name}.rope_deltas" for name, module in self.model.named_modules() if hasattr(module, "rope_deltas")]
        decoder = layers.rpartition(".")[0]
        return Findings(decoder, layers, norm, head, len(modules), tuple(sites), others, scale, softcap, tuple(state))

    def _site(self, one: _Attended, layer: str, number: int, cache: list[Any]) -> Site:
        out, gated = self._output(one, layer)
        post_norm, multiplier, problem = (None, 1.0, "it has no output projection") if out is None else ("", 1.0, "")
        if out is not None:
            post_norm, multiplier, problem = self._added(out, layer)
        heads, width = one.output.shape[2:]
        held = [i for i, layer in enumerate(cache) if _same(getattr(layer, "keys", None), one.key)]
        window = one.window if isinstance(one.window, int) and one.window > 0 else None
        return Site(
            layer=number,
            attention=one.name,
            output="" if out is None else out.name,
            cache=held[0] if held else None,
            num_heads=heads,
            num_kv_heads=one.key.shape[1],
            key_dim=one.query.shape[-1],
            head_dim=width,
            gated=gated,
            post_norm=post_norm,
            multiplier=multiplier,
            window=window,
            problem=problem,
        )

    def _output(self, one: _Attended, layer: str) -> tuple[_Call | None, bool]:
        """Return the call of the output projection, and whether its input is not the attention's output itself."""
        flat = one.output.flatten(2)
        later = [
            call
            for call in self.calls[one.before :]
            if call.name.startswith(f"{layer}.") and _is_linear(call) and call.given.shape[-1] == flat.shape[-1]
        ]
        # of a module and the one inside it, which an adapter or a quantiser wraps, the outer one
        direct = [
            call for call in later if call.given.numel() == flat.numel() and _same(call.given.reshape(flat.shape), flat)
        ]
        if direct:
            return min(direct, key=lambda call: call.name.count(".")), False
        inside = [call for call in later if call.name.startswith(f"{one.name}.")]
        return (inside[-1], True) if inside else (None, False)

    def _added(self, out: _Call, layer: str) -> tuple[str | None, float, str]:
        """Return the norm behind the output projection, the factor of what is added, and what is not understood."""
        whole = next(call for call in self.calls if call.name == layer)
        before, shape = whole.given, whole.given.shape
        at = next(i for i, call in enumerate(self.calls) if call is out)
        after = [
            call for call in self.calls[at + 1 :] if call.name.startswith(f"{layer}.") and call.output.shape == shape
        ]
        after = [call for call in after if not out.name.startswith(f"{call.name}.")]
        written: list[tuple[str | None, Tensor]] = [(None, out.output.reshape(shape))]
        written += [(call.name, call.output) for call in after if _same(call.given, written[0][1])]
        reached = [call.given for call in after if call.given.shape == shape] + [whole.output]
        reached += [whole.output - call.output for call in after]
        best: tuple[float, str | None, float, float] = (torch.inf, None, 1.0, 0.0)
        for name, write in written:
            for target in reached:
                added = (target - before).double()
                size = float(added.norm())
                if size == 0:
                    continue
                factor = float((added * write).sum() / write.double().square().sum())
                error = float((added - factor * write.double()).norm()) / size
                eps = max(torch.finfo(write.dtype).eps, torch.finfo(torch.float32).eps)
                allowed = _ROUNDINGS * eps * (1 + float(before.double().norm()) / size)
                if error < best[0]:
                    best = (error, name, factor, allowed)
        error, name, factor, allowed = best
        if not error <= min(allowed, 0.5):
            return (
                None,
                1.0,
                f"what its output projection gives is not what is added to the residual stream ({error:.2g})",
            )
        if abs(factor - 1) <= allowed:
            return name, 1.0, ""
        for number in _settings(self.model.get_submodule(layer), self.model.config.get_text_config()):
            if abs(factor / number - 1) <= max(allowed, torch.finfo(torch.float32).eps) and allowed < _SNAP:
                return name, number, ""
        return None, 1.0, f"its write is multiplied by {factor:.4g}, which is no number of the model's configuration"

    def _head(self, layers: str) -> tuple[str, str, Tensor]:
        """Return the paths of the final norm and of the unembedding, and the unembedding's output."""
        module = self.model.get_output_embeddings()
        called = [call for call in self.calls if call.module is module]
        if not called:
            raise InputError(f"{self._what} does not call its output embedding, so its logits cannot be explained")
        head = called[-1]
        norms = [
            call
            for call in self.calls
            if call.name != head.name
            and not call.name.startswith(f"{head.name}.")
            and not list(call.module.children())
            and not call.name.startswith(f"{layers}.")
            and _same(call.output, head.given)
            and not _is_linear(call)
        ]
        last = next((call for call in reversed(self.calls) if _list_of(call.name + ".") == layers), None)
        if not norms or last is None or not _same(norms[-1].given, last.output):
            raise InputError(
                f"{self._what} has more than one norm between its last layer and its unembedding, or none; it is not"
                " supported"
            )
        return norms[-1].name, head.name, head.output

    def _logits(self, raw: Tensor, logits: Tensor) -> tuple[float, float | None]:
        """Return by what the unembedding's output is multiplied, and the soft cap of the logits."""
        given, wanted = raw.double(), logits.double()
        allowed = _ROUNDINGS * max(torch.finfo(raw.dtype).eps, torch.finfo(torch.float32).eps)
        if relative_error(given, wanted) <= allowed:
            return 1.0, None
        settings = self.model.config.get_text_config()
        scale = float((given * wanted).sum() / given.square().sum())
        for number in _settings(self.model, settings, self.model.config):
            if relative_error(number * given, wanted) <= allowed:
                return number, None
        cap = getattr(settings, "final_logit_softcapping", None)
        if cap and relative_error(cap * torch.tanh(given / cap), wanted) <= allowed:
            return 1.0, float(cap)
        raise InputError(
            f"{self._what} changes the unembedding's output (by {scale:.4g}, and more) before it returns the logits;"
            " it is not supported"
        )


@contextmanager
def _still(model: Any) -> Iterator[None]:
    """Leave the modules' attributes and modes as they were, whatever a pass inside the block sets."""
    modules = list(model.modules())
    before = [dict(vars(module)) for module in modules]
    model.eval()
    try:
        yield
    finally:
        for module, attributes in zip(modules, before, strict=True):
            now = vars(module)
            for name in [name for name in now if name not in attributes and not name.startswith("_")]:
                del now[name]
            now.update({name: value for name, value in attributes.items() if not name.startswith("_")})


def _attention_config(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    return config if hasattr(config, "_attn_implementation") else None


def _whole_mask(*args: Any, **kwargs: Any) -> Tensor:
    """Make the mask as an array, bool [B, 1, R, N], where transformers would leave out a causal one."""
    mask = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
    assert mask is not None
    return mask


def _list_of(name: str) -> str:
    """Return the path of the list of layers that a module lies in, or "" if it lies in none."""
    found = re.match(r"(.*?)\.\d+\.", name)
    return found[1] if found else ""


def _cache_of(output: Any) -> Any:
    return output["cache"] if "cache" in output else output["past_key_values"]


def _same(one: Any, other: Tensor) -> bool:
    return isinstance(one, Tensor) and one.shape == other.shape and torch.equal(one, other.to(one.device))


def _is_linear(call: _Call) -> bool:
    weight = getattr(call.module, "weight", None)
    return hasattr(call.module, "in_features") or (isinstance(weight, Tensor) and weight.ndim == 2)


def mixer_of(layer: nn.Module) -> nn.Module:
    """Return what a layer without attention mixes positions with."""
    rest = re.compile("norm|mlp|feed_forward|moe|expert|dropout")
    named = [child for name, child in layer.named_children() if not rest.search(name)]
    return named[0] if named else layer


def _settings(*owners: Any) -> Iterator[float]:
    """Yield the numbers among the attributes of modules and configurations, and one over each."""
    for owner in owners:
        for value in vars(owner).values():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value not in (0, 1):
                yield float(value)
                yield 1 / float(value)


def _loose(logits: Tensor) -> float:
    """Return by how much logits may differ between two ways to compute the attention."""
    eps = max(torch.finfo(logits.dtype).eps, torch.finfo(torch.float32).eps)
    return 16 * eps if logits.element_size() == 2 else 1e3 * eps


@without_autocast
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Return attention by its definition, [B, R, H, D]."""
    groups, wide = query.shape[1] // key.shape[1], wide_type(query.dtype)
    scores = capped(query.to(wide) @ key.to(wide).repeat_interleave(groups, 1).mT * scale, softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask[..., : key.shape[2]], torch.finfo(wide).min)
    alpha = weights(scores, sinks)
    return (alpha @ value.to(wide).repeat_interleave(groups, 1)).to(value.dtype).transpose(1, 2).contiguous()
