"""Attention masks that are kept as a rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

_FACTS = {getattr(Tensor, name).__get__ for name in ("shape", "ndim", "device", "dtype", "layout", "requires_grad")}
_FACTS |= {Tensor.size, Tensor.stride, Tensor.dim, Tensor.__len__, Tensor.__hash__, Tensor.is_floating_point}


class RowMask(Tensor):
    """Which keys each row sees, kept as a rule.

    A [rows, keys] array is made for one block of rows at a time. Row i of a call is row `offset + i` of the sequence.
    For transformers and a model's own code it is a bool tensor [B, 1, rows, keys] without memory: whatever they do with
    it is done with the array that it stands for.

    Attributes:
        rule: The mask function of transformers, of (batch, head, row, key) indices.
        padding: bool [B, N], False where a key is padding. None if no key is padding.
        rows, keys: How many rows and keys the call has.
        offset: Position of the first row in the sequence.
        key_offset: Position of the first key in the sequence.
        start: The first key of each sequence that is no padding, int32 [B], if all padding is on the left.
        keep: Keeps the mask and returns a plain tensor that names it, for a graph or a static cache; None if nobody
            follows the pass.
        home: Where the rule is computed, on the device of the tensors that it may hold.
    """

    rule: Callable[..., Any]
    padding: Tensor | None
    rows: int
    keys: int
    offset: int
    key_offset: int
    start: Tensor | None
    keep: Callable[[RowMask], Tensor] | None
    home: torch.device

    @classmethod
    def of(
        cls,
        rule: Callable[..., Any],
        padding: Tensor | None,
        rows: int,
        keys: int,
        offset: int,
        key_offset: int,
        device: torch.device,
        start: Tensor | None = None,
    ) -> RowMask:
        """Make a mask of these attributes."""
        batch = 1 if padding is None else len(padding)
        empty = torch.zeros((), dtype=torch.bool, device=device).expand(batch, 1, rows, keys)
        mask = Tensor._make_subclass(cls, empty)
        mask.rule, mask.padding, mask.start = rule, padding, start
        mask.rows, mask.keys, mask.offset, mask.key_offset = rows, keys, offset, key_offset
        mask.keep, mask.home = None, torch.device(device)
        return mask

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let facts be read as they are, and do everything else with the array."""
        given = kwargs or {}
        if func not in _FACTS:
            args = torch.utils._pytree.tree_map(_array, args)
            given = torch.utils._pytree.tree_map(_array, given)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **given)

    @property
    def causal(self) -> bool:
        """True if the rows are the last ones of plain causal attention without padding."""
        return self.rule is causal_mask_function and self.padding is None and self.offset + self.rows == self.keys

    @property
    def left_padded(self) -> bool:
        """True if the rows are the last ones of causal attention, with padding on the left or none."""
        padded = self.padding is None or self.start is not None
        return self.rule is causal_mask_function and padded and self.offset + self.rows == self.keys

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """Move the mask, as accelerate does before each offloaded layer; it stays a rule unless its dtype changes."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype not in (None, torch.bool):
            return _array(self).to(*args, **kwargs)
        if device is None or torch.empty(0, device=device).device == self.device:
            return self
        padding, start = (None if part is None else part.to(device) for part in (self.padding, self.start))
        moved = RowMask.of(self.rule, padding, self.rows, self.keys, self.offset, self.key_offset, device, start)
        moved.keep, moved.home = self.keep, self.home
        return moved

    def contiguous(self, *_: Any, **__: Any) -> Tensor:
        """Return what names this mask: `generate` calls this for a static cache, so that the pass can be compiled."""
        return _array(self) if self.keep is None else self.keep(self)

    def block(self, start: int, stop: int) -> Tensor:
        """Return which keys rows `start` to `stop` see, bool [B or 1, 1, stop - start, N], True where a key is seen."""
        device = self.device if self.rule is causal_mask_function else self.home
        row = torch.arange(start, stop, device=device)[:, None] + self.offset
        key = torch.arange(self.keys, device=device)[None, :] + self.key_offset
        batch = torch.arange(1 if self.padding is None else len(self.padding), device=device)
        head = torch.zeros((), dtype=torch.long, device=device)
        seen = self.rule(batch[:, None, None], head, row[None], key[None])
        seen = seen.expand(len(batch), stop - start, self.keys)[:, None].to(self.device)
        return seen if self.padding is None else seen & self.padding[:, None, None, :]


def _array(value: Any) -> Any:
    return value.block(0, value.rows) if isinstance(value, RowMask) else value


def row_mask(  # noqa: PLR0913
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor:
    """Make the mask of a forward pass; transformers calls this once a forward pass, as its mask function.

    The end of a static cache that nothing was written to is left out of the keys.

    Returns:
        A `RowMask`, or a bool tensor [B, 1, rows, keys] for a rule that is not a function of indices alone.
    """
    q_offset, kv_offset = int(q_offset), int(kv_offset)
    kv_length = min(kv_length, q_offset + q_length - kv_offset)
    if use_vmap:
        facts: dict[str, Any] = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
        facts |= {"q_offset": q_offset}
        facts |= {"kv_offset": kv_offset, "attention_mask": attention_mask, "device": device}
        return array_mask(mask_function, use_vmap=True, **facts, **options)
    padding, start = None, None
    if attention_mask is not None:
        padding = attention_mask[:, kv_offset : kv_offset + kv_length].to(device=device, dtype=torch.bool)
        padding = F.pad(padding, (0, kv_length - padding.shape[1]))
        if padding.all():
            padding = None
        elif not (padding[:, :-1] & ~padding[:, 1:]).any():
            start = (~padding).sum(1, dtype=torch.int32)
    return RowMask.of(mask_function, padding, q_length, kv_length, q_offset, kv_offset, torch.device(device), start)


def array_mask(rule: Callable[..., Any], **facts: Any) -> Tensor:
    """Return a mask as transformers makes it for SDPA, bool [B, 1, rows, keys]; see `row_mask` for the arguments."""
    facts |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    made = sdpa_mask(mask_function=rule, **facts)
    assert made is not None
    return made
