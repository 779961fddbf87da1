"""Context manager that runs a model's attention through this library and records forward passes.

Inside `with recording(...)` the text part of a model runs on `attention.attend`, which is registered with transformers'
AttentionInterface and AttentionMaskInterface. There knockouts take effect and attention shares are summed. A
`Recording` stores what an explanation needs: the query of each explained row, its residual input to every layer and its
input to the final norm. Keys and values stay in the KV cache. When the block ends, also by an exception, the model is
restored. No other module touches transformers' attention.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from ..kernels import cast_operands
from ..knockout.attention_share import AttentionObserver
from ..knockout.plan import Plan
from ..models.linears import device_of_linear
from ..models.probe import mixer_of
from ..models.text_model import TextModel
from . import compiled
from .attention import Scoring
from .interception import AttentionFn, Interception, OnWeights
from .kv_cache import CACHE
from .linear import skinny_linears
from .record import Recording
from .row_mask import array_mask

# arguments of a decoder that a replay makes itself, or that only choose what the decoder returns
_REPLAYED = (
    "input_ids", "inputs_embeds", "position_ids", "cache", "past_key_values", "use_cache", "cache_position",
    "return_dict", "output_attentions", "output_hidden_states", "logits_to_keep",
)  # fmt: skip
_NAME = "mllm_fast_"
_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


def model_lock(text: TextModel) -> threading.RLock:
    """Return the lock of a model, which every VLM of the same model shares.

    Only one thread at a time may patch the attention of a model. Otherwise the forward passes of another thread would
    be recorded as those of this thread.
    """
    with _locks_guard:
        return _locks.setdefault(text.norm, threading.RLock())


def meet(text: TextModel) -> None:
    """Wait for the other processes of a model that is split over several, and draw the same random numbers as they."""
    if text.split is not None:
        text.split.meet()
        text.split.same_random()


@contextmanager
def recording(
    text: TextModel,
    rows: int = 0,
    knockouts: Plan | None = None,
    shares: AttentionObserver | None = None,
    backend: str = "auto",
    attention_fn: AttentionFn | None = None,
    on_weights: OnWeights | None = None,
    follower: Any = None,
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
        follower: Follows the calls of the model, which may run compiled; see `patched`. Without one it runs uncompiled.

    Yields:
        The `Recording`.
    """
    with model_lock(text):
        meet(text)
        if str(text.config._attn_implementation).startswith(_NAME):
            raise RuntimeError("this model is being recorded already; leave that block first")
        here = Interception(text, rows, knockouts, shares, backend, attention_fn, on_weights)
        if follower is None:
            hooks, uncompiled = _Hooks(here), _uncompiled()
        else:
            hooks, uncompiled = _kept_hooks(here), nullcontext()
        with uncompiled, skinny_linears(text, backend), hooks.attached(here, follower):
            yield here.record


def _uncompiled() -> AbstractContextManager[Any]:
    """Return a block in which compiled models run as they are written."""
    # importing the compiler takes a second: where nobody did, no model is compiled
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _kept_hooks(here: Interception) -> _Hooks:
    """Return hooks that an earlier block used, so that what torch.compile made of the model serves again."""
    known = here.text.kept.setdefault("hooks", {})
    which = _Which.of(here)
    if which not in known:
        known[which] = _Hooks(here)
    return known[which]


class _Which(NamedTuple):
    """Which hooks a block needs.

    Attributes:
        recorded: Whether passes are recorded.
        counted: Whether it matters how many positions were read before a pass.
        zeroed: The layers without attention whose inputs a knockout zeroes.
    """

    recorded: bool
    counted: bool
    zeroed: frozenset[int]

    @classmethod
    def of(cls, here: Interception) -> _Which:
        others, knockouts = here.text.findings.others, here.knockouts
        zeroed = frozenset() if knockouts is None else knockouts.zero_layers & set(others)
        return cls(here.rows > 0, bool(others) and (knockouts is not None or here.shares is not None), zeroed)


class _Hooks:
    """The functions that transformers and torch call while a model is recorded, and their graphs' operators.

    They do no more than pass what they are given to the `Interception` of the block. A compiled graph is made of what
    they do, so this object, its names and its numbers are the same in every block of a kind.
    """

    def __init__(self, here: Interception):
        self.text, self.which = here.text, _Which.of(here)
        self.here: Any = here
        self.number = compiled.register(self)  # by which a graph finds this
        self.name = f"{_NAME}{self.number}"
        with torch.inference_mode(False):  # a tensor that was made there cannot be written outside it
            self.clock = torch.zeros((), dtype=torch.int64, device=device_of_linear(self.text.head))
        self.follower: Any = None
        self.generating = False
        self.last_cache: Any = None  # of the last pass of a compiled model
        self._ids: list[int] = []  # of the hooks

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
        if torch.compiler.is_compiling():
            if site is None:
                raise NotImplementedError("cross-attention to images in a compiled model is not supported by mllm-fast")
            given = query, key, value, attention_mask, scoring.sinks, self.clock, self.number, site
            return compiled.attend(*given, float(scale), scoring.softcap), None
        if site is None:
            return self.here.attend_outside(module, query, key, value, attention_mask, scoring), None
        return self.here.attend(site, query, key, value, attention_mask, scoring), None

    def make_mask(
        self, batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=causal_mask_function, **others
    ) -> Tensor:
        """Make the mask of a forward pass, as transformers calls it; see `row_mask`."""
        sizes = batch_size, q_length, kv_length
        if not torch.compiler.is_compiling():
            return self.here.make_mask(*sizes, q_offset, kv_offset, mask_function, **others)
        if others.get("use_vmap") or mask_function is not causal_mask_function:
            self._note("end", kv_length, compiled.as_tensor(q_offset + (q_length - kv_offset)))
            facts = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
            return array_mask(mask_function, **facts, q_offset=q_offset, kv_offset=kv_offset, **others)
        offset, padding = compiled.as_tensor(q_offset), others.get("attention_mask")
        return compiled.row_mask(padding, offset, self.clock, self.number, 0, *sizes, kv_offset)

    def _note(self, kind: str, index: int, rows: Tensor) -> None:
        """Note rows, now or, in a graph that is being compiled, whenever it runs."""
        if torch.compiler.is_compiling():
            compiled.note(rows, self.clock, self.number, kind, index)
        else:
            self.here.note(kind, index, rows)

    def before_mixer(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Give what mixes the positions of a layer without attention zeros for the rows that a knockout names."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if torch.compiler.is_compiling():
            hidden = compiled.zeroed(hidden, self.clock, self.number, layer)
        else:
            hidden = self.here.zeroed(layer, hidden)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def count_before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note how many positions were read before a pass."""
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        cached = next(site.cache for site in self.text.sites if site.cache is not None)
        self._note("first", 0, compiled.as_tensor(0 if cache is None else cache.get_seq_length(cached)))

    def before_layer(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Record the residual input of a layer."""
        self._note("residual", layer, args[0] if args else kwargs["hidden_states"])

    def before(self, kind: str, index: int, module: nn.Module, args: tuple) -> None:
        """Record the input of a part."""
        self._note(kind, index, args[0])

    def before_decoder(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Record the arguments that the decoder gets in a pass."""
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:  # a text-only model gets token ids
            embeds = self.text.decoder.get_input_embeddings()(args[0] if args else kwargs["input_ids"])
        positions = kwargs.get("position_ids")
        others = {}
        for name, given in kwargs.items():  # a loop: older compilers do not follow such a comprehension
            if name not in _REPLAYED and given is not None and given is not False:
                others[name] = given
        if torch.compiler.is_compiling():
            compiled.note_inputs(embeds, positions, others, self.clock, self.number)
        else:
            self.here.note_inputs(embeds, positions, others)

    def before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Let the follower know of a call of the model, before it runs."""
        if self.generating:
            return
        if torch.compiler.is_compiling():
            compiled.begin_call(args, kwargs, self.clock, self.number)
        else:
            self.follower.before(args, kwargs)

    def after_model(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Let the follower know of a call of the model, after it ran."""
        if torch.compiler.is_compiling():
            self.last_cache = output.get(CACHE)
        else:
            self.follower.after(args, kwargs, output)

    @contextmanager
    def attached(self, here: Interception, follower: Any = None) -> Iterator[None]:
        """Run the model on `forward` inside the block, and record it if the block records."""
        text, self.here, self.follower = self.text, here, follower
        before = text.config._attn_implementation
        handles: list[RemovableHandle] = []
        try:
            AttentionInterface.register(self.name, self.forward)
            AttentionMaskInterface.register(self.name, self.make_mask)
            for module, hook, keywords in self._all():
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=keywords))
            if follower is not None:
                follower.hooks, self.last_cache = self, None
                model = follower.model
                handles.append(model.register_forward_pre_hook(self.before_model, with_kwargs=True, prepend=True))
                handles.append(model.register_forward_hook(self.after_model, with_kwargs=True))
            self._number(handles)
            text.config._attn_implementation = self.name
            yield
        finally:
            text.config._attn_implementation = before
            for handle in handles:
                handle.remove()
            AttentionInterface._global_mapping.pop(self.name, None)
            AttentionMaskInterface._global_mapping.pop(self.name, None)
            self.here = self.follower = self.last_cache = None  # which hold what was recorded, and the keys and values

    def _all(self) -> Iterator[tuple[nn.Module, Callable, bool]]:
        """Yield each module with a hook, the hook, and whether it takes keyword arguments."""
        text = self.text
        if self.which.counted:
            yield text.decoder, self.count_before, True
        for i in sorted(self.which.zeroed):
            yield mixer_of(text.layers[i]), partial(self.before_mixer, i), True
        if not self.which.recorded:
            return
        yield text.decoder, self.before_decoder, True
        for i, layer in enumerate(text.layers):
            yield layer, partial(self.before_layer, i), True
        for i, site in enumerate(text.sites):
            if site.gated:
                yield text.outputs[i], partial(self.before, "output", i), False
            behind = text.post_norms[i]
            if text.post_norm(i) is not None and behind is not None:
                yield behind, partial(self.before, "post norm", i), False
        yield text.norm, partial(self.before, "final", 0), False

    def _number(self, handles: list[RemovableHandle]) -> None:
        """Give hooks the numbers that they had in an earlier block, by which graphs find them."""
        if not self._ids:
            self._ids = [handle.id for handle in handles]
        for handle, number in zip(handles, self._ids, strict=True):
            if handle.id == number:
                continue
            for table in (handle.hooks_dict_ref(), *(one() for one in handle.extra_dict_ref)):
                if table is not None and handle.id in table:
                    table[number] = table.pop(handle.id)
            handle.id = number
