"""The one seam with transformers' attention.

Inside `with recording(...)` the text part of a model runs on `attend` below, registered with transformers'
AttentionInterface and AttentionMaskInterface, and a Recording takes what an explanation needs: of each
explained row its query, its residual input to every layer and its input to the final norm. Keys and values
stay where they are, in the KV cache. On leaving, by exception too, everything is as it was.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from .adapters import TextModel
from .errors import InputError

_ROW_BLOCK = 256  # query rows whose mask is materialised at a time
_REFUSED = ("softcap", "s_aux", "position_bias")  # arguments that change the attention and are not computed here
_names = itertools.count()
_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


@dataclass
class RowMask:
    """Which keys each row sees, kept as a rule: a [rows, keys] array is made for a block of rows at a time.

    rule: transformers' mask function of (batch, head, row, key) indices. padding: bool [B, N], or None
    where no key is padding. Row i of the call is row `offset + i` of the sequence.
    """

    rule: Callable[..., Any]
    padding: Tensor | None
    rows: int
    keys: int
    offset: int
    key_offset: int
    device: torch.device

    @property
    def causal(self) -> bool:
        """True if the rows are the last ones of plain causal attention without padding."""
        return self.rule is causal_mask_function and self.padding is None and self.offset + self.rows == self.keys

    def contiguous(self) -> RowMask:
        """What `generate` calls where it makes the mask itself, for a cache that can be compiled."""
        raise InputError("a static cache cannot be explained; leave cache_implementation at transformers' default")

    @property
    def ndim(self) -> int:
        """The same in older releases of transformers."""
        return self.contiguous().ndim

    def block(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` as bool [B or 1, 1, stop - start, N], True where a key is seen."""
        row = torch.arange(start, stop, device=self.device)[:, None] + self.offset
        key = torch.arange(self.keys, device=self.device)[None, :] + self.key_offset
        batch = torch.arange(1 if self.padding is None else len(self.padding), device=self.device)
        head = torch.zeros((), dtype=torch.long, device=self.device)
        seen = self.rule(batch[:, None, None], head, row[None], key[None])
        seen = seen.expand(len(batch), stop - start, self.keys)[:, None]
        return seen if self.padding is None else seen & self.padding[:, None, None, :]


def row_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> RowMask:
    """The mask counterpart that transformers calls, once a forward pass."""
    if use_vmap:
        raise NotImplementedError("a mask rule that is not a function of indices alone is not supported here")
    padding = None
    if attention_mask is not None:
        padding = attention_mask[:, kv_offset : kv_offset + kv_length].to(device=device, dtype=torch.bool)
        padding = F.pad(padding, (0, kv_length - padding.shape[1]))  # a static cache's unused end
        if padding.all():
            padding = None
    return RowMask(mask_function, padding, q_length, kv_length, int(q_offset), int(kv_offset), torch.device(device))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: RowMask | Tensor | None, scale: float) -> Tensor:
    """Exact attention by torch's SDPA, [B, H, R, D] x [B, Hkv, N, D] -> [B, H, R, D].

    Nothing of size rows x keys is stored beyond a block of rows. `mask` may also be a ready 4-D mask, as
    transformers lets a caller pass one. Rows that see no key give zeros.
    """
    rows, groups = query.shape[2], query.shape[1] // key.shape[1]
    if isinstance(mask, RowMask) and mask.causal:
        if rows == key.shape[2]:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=groups > 1)
        if rows == 1:  # decoding: the group's heads become rows over one key head
            packed = query.reshape(query.shape[0], key.shape[1], groups, query.shape[3])
            return F.scaled_dot_product_attention(packed, key, value, scale=scale).reshape(query.shape)
    if mask is None:  # without a rule there would be no causality either
        raise RuntimeError("no mask came with this attention: the model does not use transformers' mask interface")
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = torch.empty_like(query)
    for start in range(0, rows, _ROW_BLOCK):
        stop = min(start + _ROW_BLOCK, rows)
        block = mask.block(start, stop) if isinstance(mask, RowMask) else mask[:, :, start:stop, : key.shape[2]]
        part = F.scaled_dot_product_attention(query[:, :, start:stop], key, value, attn_mask=block, scale=scale)
        if block.dtype == torch.bool:
            part = part.masked_fill(~block.any(-1, keepdim=True), 0)
        out[:, :, start:stop] = part
    return out


def model_lock(text: TextModel) -> threading.RLock:
    """The lock of a model: its attention is patched for one thread at a time, and what another thread ran
    meanwhile would be recorded as this one's. Every VLM of the same model shares it."""
    with _locks_guard:
        return _locks.setdefault(text.norm, threading.RLock())


@dataclass
class Recording:
    """Rows recorded of each forward pass: the last `rows` of it, [B, rows, ...] a pass.

    residual, query: one list a layer; query [B, rows, H, D], rotated; final: inputs of the final norm. `seen`:
    for each pass the keys that the rows see, bool [B or 1, rows, N], or None for plain causal attention.
    `last`: the position of each pass's last row, None where the caller's own mask does not tell.
    """

    rows: int
    num_layers: int
    device: torch.device
    residual: list[list[Tensor]] = field(init=False)
    query: list[list[Tensor]] = field(init=False)
    final: list[Tensor] = field(default_factory=list)
    seen: list[list[Tensor | None]] = field(init=False)
    scale: list[float] = field(init=False)
    last: list[int | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.residual = [[] for _ in range(self.num_layers)]
        self.query = [[] for _ in range(self.num_layers)]
        self.seen = [[] for _ in range(self.num_layers)]
        self.scale = [0.0] * self.num_layers

    def take(self, hidden: Tensor) -> Tensor:
        """The recorded rows of [B, R, d], copied so that the rest of the pass can be freed."""
        return hidden[:, -self.rows :].detach().to(self.device, copy=True)

    def on_attention(self, layer: int, query: Tensor, mask: RowMask | Tensor | None, scale: float) -> None:
        self.scale[layer] = scale
        self.query[layer].append(self.take(query.transpose(1, 2)))
        if layer == 0:
            self.last.append(mask.offset + mask.rows - 1 if isinstance(mask, RowMask) else None)
        seen = None
        if isinstance(mask, RowMask) and not mask.causal:
            seen = mask.block(max(0, mask.rows - self.rows), mask.rows)[:, 0]
        elif isinstance(mask, Tensor):
            last = mask[:, 0, -self.rows :]
            seen = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
        self.seen[layer].append(seen)


@contextmanager
def recording(text: TextModel, rows: int) -> Iterator[Recording]:
    """Run the text part on `attend` and record the last `rows` rows of every forward pass inside.

    Only the text part is touched: vision towers use the same interface of transformers. The name under
    which the functions are registered is new each time, so that several models do not meet; other threads
    wait for this model (`model_lock`). Recordings of one model cannot be nested.
    """
    with model_lock(text):
        if str(text.config._attn_implementation).startswith("mllm_fast_"):
            raise RuntimeError("this model is being recorded already; leave that block first")
        with _recording(text, rows) as record:
            yield record


@contextmanager
def _recording(text: TextModel, rows: int) -> Iterator[Recording]:
    record = Recording(rows, len(text.layers), text.outputs[-1].weight.device)
    name = f"mllm_fast_{next(_names)}"
    before = text.config._attn_implementation

    def forward(module: nn.Module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        for refused in _REFUSED:
            if kwargs.get(refused) is not None:
                raise NotImplementedError(f"attention with {refused!r} is not supported by mllm-fast")
        if dropout:
            raise NotImplementedError("attention dropout is for training; call model.eval() first")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        record.on_attention(module.layer_idx, query, attention_mask, scale)  # type: ignore[arg-type]
        return attend(query, key, value, attention_mask, scale).transpose(1, 2).contiguous(), None

    def before_layer(layer: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            record.residual[layer].append(record.take(args[0] if args else kwargs["hidden_states"]))

        return hook

    handles = []
    try:
        AttentionInterface.register(name, forward)
        AttentionMaskInterface.register(name, row_mask)
        for i, layer in enumerate(text.layers):
            handles.append(layer.register_forward_pre_hook(before_layer(i), with_kwargs=True))
        handles.append(text.norm.register_forward_pre_hook(lambda _, args: record.final.append(record.take(args[0]))))
        text.config._attn_implementation = name
        yield record
    finally:
        text.config._attn_implementation = before
        for handle in handles:
            handle.remove()
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)
