"""Context manager that runs a model's attention through this library and records forward passes.

Inside `with recording(...)` the text part of a model runs on `attention.attend`, which is registered with transformers'
AttentionInterface and AttentionMaskInterface. There knockouts take effect and attention shares are summed. A
`Recording` stores what an explanation needs: the query of each explained row, its residual input to every layer and its
input to the final norm. Keys and values stay in the KV cache. When the block ends, also by an exception, the model is
restored. No other module touches transformers' attention.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..core.errors import InputError
from ..kernels import cast_operands, wide_type
from ..kernels.knockout_attention.reference import open_pairs
from ..knockout.attention_share import AttentionObserver
from ..knockout.plan import Plan
from ..models.linears import device_of_linear
from ..models.norms import Norm
from ..models.probe import mixer_of
from ..models.text_model import TextModel
from .attention import Closed, Scoring, attend, attend_dense, seen_by
from .linear import skinny_linears
from .row_mask import RowMask, row_mask

# arguments of a decoder that a replay makes itself, or that only choose what the decoder returns
_REPLAYED = (
    "input_ids", "inputs_embeds", "position_ids", "cache", "past_key_values", "use_cache", "cache_position",
    "return_dict", "output_attentions", "output_hidden_states", "logits_to_keep",
)  # fmt: skip
AttentionFn = Callable[[int, Tensor, Tensor, Tensor, Scoring], Tensor]  # site, query, key, value, scoring -> output
OnWeights = Callable[[int, Tensor], None]  # site, alpha [B, H, R, N]
_names = itertools.count()
_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


def model_lock(text: TextModel) -> threading.RLock:
    """Return the lock of a model, which every VLM of the same model shares.

    Only one thread at a time may patch the attention of a model. Otherwise the forward passes of another thread would
    be recorded as those of this thread.
    """
    with _locks_guard:
        return _locks.setdefault(text.norm, threading.RLock())


@dataclass
class Recording:
    """The last `rows` rows of each forward pass, [B, rows, ...] a pass.

    Attributes:
        rows: How many rows are recorded of each pass.
        num_layers: How many layers the model has.
        num_sites: How many of them have attention.
        device: Where the recorded rows are stored.
        residual: Residual input of each layer, one list of passes a layer.
        query: Rotated queries, [B, rows, H, D], one list of passes a site.
        output: What the heads give to the output projection, [B, rows, H, Dv], one list of passes a site.
        gate: The factor of the heads' output before the output projection, in the shape of `output`, one list of passes
            a site; empty for a site without a gate.
        write_scale: The scale of the norm behind the output projection, [B, rows], one list of passes a site; empty for
            a site without such a norm.
        attended: The keys and values of the last pass, [B, Hkv, N, D], of each site whose cache holds something else.
        final: Inputs of the final norm, one a pass.
        seen: Which keys the rows see, one list of passes a site: bool [B or 1, rows, N], or None for plain causal
            attention.
        scoring: How scores become attention weights, one a site.
        last: Position of the last row of each pass, or None if the caller's own mask does not tell it.
        embeds: Input embeddings of all rows of each pass, [B, R, d].
        positions: Position ids of all rows of each pass, [..., B, R], or None.
        others: Further arguments that the decoder got in each pass, by name; see `explain.replay.Replay`.
    """

    rows: int
    num_layers: int
    num_sites: int
    device: torch.device
    residual: list[list[Tensor]] = field(init=False)
    query: list[list[Tensor]] = field(init=False)
    output: list[list[Tensor]] = field(init=False)
    gate: list[list[Tensor]] = field(init=False)
    write_scale: list[list[Tensor]] = field(init=False)
    attended: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    final: list[Tensor] = field(default_factory=list)
    seen: list[list[Tensor | None]] = field(init=False)
    scoring: list[Scoring] = field(init=False)
    last: list[int | None] = field(default_factory=list)
    embeds: list[Tensor] = field(default_factory=list)
    positions: list[Tensor | None] = field(default_factory=list)
    others: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.residual = [[] for _ in range(self.num_layers)]
        sites = range(self.num_sites)
        self.query, self.output = [[] for _ in sites], [[] for _ in sites]
        self.gate, self.write_scale = [[] for _ in sites], [[] for _ in sites]
        self.seen = [[] for _ in range(self.num_sites)]
        self.scoring = [Scoring(0.0)] * self.num_sites

    def cut(self) -> Recording:
        """Return what was recorded until now as a separate recording, and clear this one."""
        past = copy(self)
        self.__init__(self.rows, self.num_layers, self.num_sites, self.device)  # type: ignore[misc]
        return past

    def take(self, hidden: Tensor) -> Tensor:
        """Return the recorded rows of [B, R, ...].

        They are copied if the pass has other rows, so that the memory of those can be freed.
        """
        rows = hidden if hidden.shape[1] == self.rows else hidden[:, -self.rows :].clone()
        return (rows.detach() if rows.requires_grad else rows).to(self.device)

    def on_attention(
        self, site: int, query: Tensor, keys: int, mask: Tensor | None, scoring: Scoring, closed: Closed | None
    ) -> None:
        self.scoring[site] = scoring
        self.query[site].append(self.take(query.transpose(1, 2)))
        if site == 0:
            self.last.append(mask.offset + mask.rows - 1 if isinstance(mask, RowMask) else None)
        seen = None
        if mask is not None and not (isinstance(mask, RowMask) and mask.causal and closed is None):
            rows = query.shape[2]
            visible, bias = seen_by(mask, max(0, rows - self.rows), rows, rows, keys, closed)
            if visible.shape[1] > 1 or (bias is not None and torch.where(visible, bias, 0).any()):
                raise InputError(
                    "the attention mask differs from head to head, or adds to the scores of keys that are seen: an"
                    " explanation knows masks that close keys alone, for all heads; pass such a mask to generate only"
                )
            seen = visible[:, 0]
        self.seen[site].append(seen)


@contextmanager
def recording(
    text: TextModel,
    rows: int = 0,
    knockouts: Plan | None = None,
    shares: AttentionObserver | None = None,
    backend: str = "auto",
    attention_fn: AttentionFn | None = None,
    on_weights: OnWeights | None = None,
) -> Iterator[Recording]:
    """Run the text part of a model on `attention.attend`, and record the last `rows` rows of every forward pass.

    Only the text part is changed: vision towers use the same interface of transformers. The functions are registered
    under a new name each time, so that several models do not conflict. Other threads wait for this model
    (`model_lock`). Blocks for the same model cannot be nested.

    Args:
        text: The text part of a model.
        rows: How many rows are recorded of each pass.
        knockouts: The plan of the knockouts that apply.
        shares: An observer that receives the attention mass.
        backend: The backend of the kernels.
        attention_fn: Called in place of `attend`, (site, query, key, value, scoring) -> output. It is for callers that
            keep keys, values and the mask rule elsewhere.
        on_weights: Called with the number and the attention weights of every site. Gradients flow through the weights
            if they are enabled.

    Yields:
        The `Recording`.
    """
    with model_lock(text):
        if str(text.config._attn_implementation).startswith("mllm_fast_"):
            raise RuntimeError("this model is being recorded already; leave that block first")
        made = _Attachment(text, rows, knockouts, shares, backend, attention_fn, on_weights)
        with skinny_linears(text, backend), made.attached() as record:
            yield record


@dataclass
class _Attachment:
    """The functions that are registered with transformers while a model is recorded; see `recording` for the fields."""

    text: TextModel
    rows: int
    knockouts: Plan | None
    shares: AttentionObserver | None
    backend: str
    attention_fn: AttentionFn | None
    on_weights: OnWeights | None
    record: Recording = field(init=False)
    first: int = 0  # positions that were read before the pass

    def __post_init__(self) -> None:
        self.record = Recording(
            self.rows, len(self.text.layers), len(self.text.sites), device_of_linear(self.text.head)
        )

    def forward(
        self, module: nn.Module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs
    ) -> tuple[Tensor, None]:
        """Compute the attention of one layer, as transformers calls it."""
        if kwargs.get("position_bias") is not None:
            raise NotImplementedError("attention with 'position_bias' is not supported by mllm-fast")
        if dropout:
            raise NotImplementedError("attention dropout is for training; call model.eval() first")
        query, key, value = cast_operands(query, key, value)
        site = self.text.by_module.get(module)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        scoring = Scoring(scale, kwargs.get("softcap"), kwargs.get("s_aux"))
        if site is None:
            return self._attend_outside(module, query, key, value, attention_mask, scoring), None
        if self.attention_fn is not None:
            if self.rows:
                self.record.on_attention(site, query, key.shape[2], None, scoring, None)
            output = self.attention_fn(site, query, key, value, scoring)
        else:
            closed = self._closed(site, len(query), key.shape[2], attention_mask)
            if self.on_weights is not None:
                output, alpha = attend_dense(query, key, value, attention_mask, scoring, closed)
                self.on_weights(site, alpha)
                return output.transpose(1, 2).contiguous(), None
            output = self._attend(site, query, key, value, attention_mask, scoring, closed)
        output = output.transpose(1, 2)
        if self.rows:
            self.record.output[site].append(self.record.take(output))
        return output.contiguous(), None

    def _attend_outside(self, module: nn.Module, query, key, value, mask, scoring: Scoring) -> Tensor:
        """Compute cross-attention to the keys of the images, which lie outside the sequence, [B, R, H, D].

        A row that may not attend to an image's token may not attend to its keys either.
        """
        layer = next((i for i in self.text.findings.others if module in set(self.text.layers[i].modules())), None)
        if layer is None or self.rows or self.attention_fn is not None or self.on_weights is not None:
            raise InputError(
                f"a {type(module).__name__} attends, which does not when the model reads text alone: cross-attention to"
                " keys outside the sequence can be knocked out, and cannot be explained or compressed"
            )
        batch, rows, keys = len(query), query.shape[2], key.shape[2]
        seen = torch.ones(batch, 1, rows, keys, dtype=torch.bool, device=query.device)
        if mask is not None:
            whole, bias = seen_by(mask, 0, rows, rows, keys, None)
            if bias is not None and torch.where(whole, bias, 0).any():
                raise InputError("cross-attention with a mask that adds to the scores of seen keys is not supported")
            seen = seen & whole
        rules = None if self.knockouts is None else self.knockouts.layers[layer]
        if rules is not None:
            images = rules.images
            if images is None or keys % max(1, images.shape[1]):
                raise InputError("knockouts of a model with cross-attention need the same number of images a prompt")
            kinds = rules.segments(batch, self.first + rows)[:, self.first :]
            images = images.to(kinds.device).repeat_interleave(batch // len(images), 0)
            images = images.repeat_interleave(keys // images.shape[1], 1)
            seen = seen & open_pairs(kinds.expand(batch, -1), images, rules.table)[:, None]
        found = attend(query, key, value, seen, scoring, None, False, self.backend)
        observed = self.shares
        if observed is not None and observed.wants(self.first, rows) is not False:
            observed.add_outside(layer, seen.any(-1).to(query.dtype).mean(2).expand(-1, query.shape[1]))
        return found.output.transpose(1, 2).contiguous()

    def _closed(self, site: int, batch: int, keys: int, mask: Tensor | None) -> Closed | None:
        """Return segments and table of the knockouts at a site, or None if it has none."""
        rules = None if self.knockouts is None else self.knockouts.layers[self.text.sites[site].layer]
        if rules is None:
            return None
        # keep only the positions of the keys: with a sliding window they do not begin at 0
        before = mask.key_offset if isinstance(mask, RowMask) else 0
        return rules.segments(batch, before + keys)[:, before:], rules.table

    def _attend(self, site: int, query, key, value, mask, scoring: Scoring, closed: Closed | None) -> Tensor:
        if self.rows:
            if self.text.sites[site].cache is None:
                self.record.attended[site] = key, value
            self.record.on_attention(site, query, key.shape[2], mask, scoring, closed)
        observed = self.shares
        mass = False if observed is None else observed.wants(key.shape[2] - query.shape[2], query.shape[2])
        if isinstance(mass, Tensor):
            mass = mass.to(query.device)
        found = attend(query, key, value, mask, scoring, closed, mass, self.backend)
        if observed is not None and found.mass is not None:
            observed.add(site, found.mass)
        return found.output

    def before_mixer(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Give what mixes the positions of a layer without attention zeros for the rows that a knockout names."""
        hidden = args[0] if args else kwargs["hidden_states"]
        rules = None if self.knockouts is None else self.knockouts.layers[layer]
        if rules is None or rules.zeroed is None:
            return None
        kinds = rules.segments(len(hidden), self.first + hidden.shape[1])[:, self.first :].long()
        hidden = hidden.masked_fill(rules.zeroed[kinds][..., None], 0)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def count_before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note how many positions were read before a pass."""
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        cached = next(site.cache for site in self.text.sites if site.cache is not None)
        self.first = 0 if cache is None else cache.get_seq_length(cached)

    def before_layer(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Record the residual input of a layer."""
        hidden = args[0] if args else kwargs["hidden_states"]
        self.record.residual[layer].append(self.record.take(hidden))

    def before_output(self, site: int, module: nn.Module, args: tuple) -> None:
        """Record what a gated site gives to its output projection, and the gate."""
        attended = self.record.output[site][-1]
        given = self.record.take(args[0]).reshape(attended.shape)
        # a head whose output is 0 has no gate to be read, and nothing that it multiplies
        self.record.gate[site].append(torch.where(attended == 0, 0, given / attended))
        self.record.output[site][-1] = given

    def before_post_norm(self, site: int, norm: Norm, module: nn.Module, args: tuple) -> None:
        """Record the scale of the norm behind an output projection."""
        rows = self.record.take(args[0])
        self.record.write_scale[site].append(norm.scale(rows.to(wide_type(rows.dtype))))

    def before_decoder(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Record the arguments that the decoder gets in a pass."""
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:  # a text-only model gets token ids
            embeds = self.text.decoder.get_input_embeddings()(args[0] if args else kwargs["input_ids"])  # type: ignore[operator]
        self.record.embeds.append(embeds)
        self.record.positions.append(kwargs.get("position_ids"))
        others = {name: given for name, given in kwargs.items() if name not in _REPLAYED}
        self.record.others.append(
            {name: given for name, given in others.items() if given is not None and given is not False}
        )

    @contextmanager
    def attached(self) -> Iterator[Recording]:
        """Run the model on `forward` inside the block, and record it if `rows` is not 0."""
        text, record = self.text, self.record
        name = f"mllm_fast_{next(_names)}"
        before = text.config._attn_implementation
        handles = []
        try:
            AttentionInterface.register(name, self.forward)
            AttentionMaskInterface.register(name, row_mask)
            zeroed = frozenset() if self.knockouts is None else self.knockouts.zero_layers & set(text.findings.others)
            if text.findings.others and (self.knockouts is not None or self.shares is not None):
                handles.append(text.decoder.register_forward_pre_hook(self.count_before, with_kwargs=True))
            for i in zeroed:
                mixer = mixer_of(text.layers[i])
                handles.append(mixer.register_forward_pre_hook(partial(self.before_mixer, i), with_kwargs=True))
            if self.rows:
                handles.append(text.decoder.register_forward_pre_hook(self.before_decoder, with_kwargs=True))
                for i, layer in enumerate(text.layers):
                    handles.append(layer.register_forward_pre_hook(partial(self.before_layer, i), with_kwargs=True))
                for i, site in enumerate(text.sites):
                    norm, behind = text.post_norm(i), text.post_norms[i]
                    if site.gated:
                        handles.append(text.outputs[i].register_forward_pre_hook(partial(self.before_output, i)))
                    if norm is not None and behind is not None:
                        handles.append(behind.register_forward_pre_hook(partial(self.before_post_norm, i, norm)))
                take = lambda _, args: record.final.append(record.take(args[0]))  # noqa: E731
                handles.append(text.norm.register_forward_pre_hook(take))
            text.config._attn_implementation = name
            yield record
        finally:
            text.config._attn_implementation = before
            for handle in handles:
                handle.remove()
            AttentionInterface._global_mapping.pop(name, None)
            AttentionMaskInterface._global_mapping.pop(name, None)
