"""What a model that runs under `torch.compile` does at the seam, as operators that a graph calls.

A compiled graph cannot read a prompt's layout, look up a rule or append to a recording: these depend on numbers that
are known when it runs. Each of these operators has a shape that is known before, and when it runs it does what the
uncompiled seam does, so knockouts and recordings are the same with `fullgraph=True` and without. All of them write to
`clock`, a tensor of the block, which keeps them in order and lets no compiler drop one.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
from .attention import Scoring
from .kv_cache import CACHE

_CACHES = tuple(dict.fromkeys((CACHE, "cache", "past_key_values")))

_numbers = itertools.count()
_seams: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def register(seam: Any) -> int:
    """Return the number by which graphs find what runs behind the operators."""
    number = next(_numbers)
    _seams[number] = seam
    return number


def _here(number: int) -> Any:
    """Return what happens at the seams of the block."""
    return _seam(number).here


def _seam(number: int) -> Any:
    seam = _seams.get(number)
    if seam is None or seam.follower is None:
        raise InputError(
            "a model that was compiled inside a block of knocked_out or recording runs outside it: torch.compile checks"
            " hooks only if torch._dynamo.config.skip_nnmodule_hook_guards is False"
        )
    return seam


@torch.library.custom_op("mllm_fast::attend", mutates_args=("clock",))
def attend(  # noqa: PLR0913
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    clock: Tensor,
    number: int,
    site: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Compute the attention of one site as the seam does, [B, R, H, D]."""
    clock.add_(1)
    found = _here(number).attend_in_graph(site, query, key, value, mask, Scoring(scale, softcap, sinks))
    return found.clone(memory_format=torch.contiguous_format)  # an operator's result is no view of what it was given


@attend.register_fake
def _(query, key, value, mask, *others):  # type: ignore[no-untyped-def]
    batch, heads, rows, _ = query.shape
    return value.new_empty(batch, rows, heads, value.shape[-1])


@torch.library.custom_op("mllm_fast::row_mask", mutates_args=("clock",))
def row_mask(  # noqa: PLR0913
    padding: Tensor | None,
    offset: Tensor,
    clock: Tensor,
    number: int,
    slot: int,
    batch: int,
    rows: int,
    keys: int,
    key_offset: int,
) -> Tensor:
    """Make a causal mask of a pass, and return what names it: its last dimension is the slot and one."""
    clock.add_(1)
    given = {"attention_mask": padding, "device": clock.device}
    _here(number).make_mask_in_graph(slot, batch, rows, keys, int(offset), key_offset, **given)
    return ticket(slot, clock.device)


@row_mask.register_fake
def _(padding, offset, clock, number, slot, *sizes):  # type: ignore[no-untyped-def]
    return ticket(slot, clock.device)


def ticket(slot: int, device: torch.device) -> Tensor:
    """Return a tensor that stands for the mask that is kept in a slot."""
    return torch.zeros(1, 1, 1, slot + 1, dtype=torch.uint8, device=device)


def slot_of(mask: Tensor | None) -> int | None:
    """Return the slot that a mask's ticket names, or None for a mask that a caller or transformers made."""
    return mask.shape[3] - 1 if mask is not None and mask.dtype == torch.uint8 else None


@torch.library.custom_op("mllm_fast::note", mutates_args=("clock",))
def note(rows: Tensor, clock: Tensor, number: int, kind: str, index: int) -> None:
    """Record rows of a pass."""
    clock.add_(1)
    _here(number).note(kind, index, rows.clone())  # the graph gives the memory to others


@note.register_fake
def _(rows, clock, number, kind, index):  # type: ignore[no-untyped-def]
    return None


@torch.library.custom_op("mllm_fast::note_inputs", mutates_args=("clock",))
def _note_inputs(
    embeds: Tensor, positions: Tensor | None, others: Sequence[Tensor], names: str, clock: Tensor, number: int
) -> None:
    """Record what the decoder gets in a pass."""
    clock.add_(1)
    given = joined([one.clone() for one in others], names)
    _here(number).note_inputs(embeds.clone(), None if positions is None else positions.clone(), given)


@_note_inputs.register_fake
def _(embeds, positions, others, names, clock, number):  # type: ignore[no-untyped-def]
    return None


def note_inputs(embeds: Tensor, positions: Tensor | None, others: dict[str, Any], clock: Tensor, number: int) -> None:
    """Let a graph record what the decoder gets in a pass."""
    tensors, names = taken_apart(others)
    _note_inputs(embeds, positions, tensors, names, clock, number)


def taken_apart(given: dict[str, Any]) -> tuple[list[Tensor], str]:
    """Return the tensors of keyword arguments, and their names with those of what cannot be passed to an operator."""
    tensors: list[Tensor] = []
    names: list[str] = []
    for name, one in given.items():
        if isinstance(one, Tensor):
            tensors.append(one)
            names.append(f"{name}=")
        elif isinstance(one, (list, tuple)) and len(one) > 0 and all([isinstance(part, Tensor) for part in one]):
            tensors.extend(one)
            names.append(f"{name}*{len(one)}")
        elif isinstance(one, dict) and len(one) > 0 and all([isinstance(part, Tensor) for part in one.values()]):
            tensors.extend(one.values())
            names.append(f"{name}:" + ",".join(one))
        else:
            names.append(f"{name}?")
    return tensors, " ".join(names)


def joined(tensors: Sequence[Tensor], names: str) -> dict[str, Any]:
    """Return the keyword arguments that `taken_apart` took apart; what was no tensor is the word "other"."""
    left = iter(tensors)
    found: dict[str, Any] = {}
    for one in names.split():
        name = one.rstrip("=?") if one[-1] in "=?" else one.partition(":")[0].partition("*")[0]
        if one[-1] == "?":
            found[name] = "other"
        elif one[-1] == "=":
            found[name] = next(left)
        elif ":" in one:
            found[name] = {kind: next(left) for kind in one.partition(":")[2].split(",")}
        else:
            found[name] = [next(left) for _ in range(int(one.partition("*")[2]))]
    return found


def as_tensor(number: Any) -> Tensor:
    """Return a number as a tensor, for a graph."""
    return number if isinstance(number, Tensor) else torch.full((), number, dtype=torch.int64)


@torch.library.custom_op("mllm_fast::zeroed", mutates_args=("clock",))
def zeroed(hidden: Tensor, clock: Tensor, number: int, layer: int) -> Tensor:
    """Return the inputs of a layer with zeros where a knockout says so."""
    clock.add_(1)
    return _here(number).zeroed(layer, hidden).clone()


@zeroed.register_fake
def _(hidden, clock, number, layer):  # type: ignore[no-untyped-def]
    return torch.empty_like(hidden)


@torch.library.custom_op("mllm_fast::begin", mutates_args=("clock",))
def begin(
    ids: Tensor,
    mask: Tensor | None,
    read: Tensor,
    others: Sequence[Tensor],
    names: str,
    clock: Tensor,
    number: int,
    cached: bool,
) -> None:
    """Find the prompt that a call belongs to. `read` is how many positions its cache holds."""
    clock.add_(1)
    inputs = joined([one.clone() for one in others], names)
    if mask is not None:
        inputs["attention_mask"] = mask.clone()
    _seam(number).follower.begin_in_graph(ids.clone(), int(read), cached, inputs)


@begin.register_fake
def _(ids, mask, read, others, names, clock, number, cached):  # type: ignore[no-untyped-def]
    return None


def cache_given(kwargs: dict[str, Any]) -> Any:
    """Return the KV cache among the arguments of a call, or None."""
    for name in _CACHES:
        if kwargs.get(name) is not None:
            return kwargs[name]
    return None


def begin_call(args: tuple, kwargs: dict[str, Any], clock: Tensor, number: int) -> None:
    """Let a graph find the prompt of each call of the model."""
    ids, cache = kwargs.get("input_ids", args[0] if args else None), cache_given(kwargs)
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise InputError("a compiled model is called with input_ids, int64 [sequences, tokens], inside this block")
    read = as_tensor(0 if cache is None else cache.get_seq_length())
    left = {name: one for name, one in kwargs.items() if name not in _CACHES and one is not None}
    left.pop("input_ids", None)
    mask = left.pop("attention_mask", None)
    mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
    tensors, names = taken_apart(left)
    begin(ids, mask, read, tensors, names, clock, number, cache is not None)
