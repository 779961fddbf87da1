"""A device that is made of CPU tensors: `two:0` and `two:1`, which refuse to be mixed as two cards do.

A tensor of the device is a `Placed`, which holds the CPU tensor that has its values and says that it lies elsewhere.
`with placing():` makes factories (`torch.zeros(..., device="two:1")`) and moves (`.to("two:0")`) give such tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from mllm_fast.models import linears, part_checks, plain_layers, text_model
from mllm_fast.runtime.row_mask import RowMask

ATEN = torch.ops.aten
_MOVES = (ATEN._to_copy.default, ATEN.copy_.default)
_INDEXING = (ATEN.index.Tensor, ATEN.index_put_.default, ATEN.index_put.default, ATEN._index_put_impl_.default)


def register() -> None:
    """Give torch's spare backend the name of the device, once a process."""
    if torch._C._get_privateuse1_backend_name() != "two":
        backend_registration._setup_privateuseone_for_python_backend("two")


class Placed(torch.Tensor):
    """A tensor of the device, with the CPU tensor that has its values."""

    @staticmethod
    def __new__(cls, values: torch.Tensor, device: torch.device) -> Placed:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=device,
            requires_grad=values.requires_grad,
        )
        made.values_here = values
        return made

    def tolist(self) -> Any:
        return self.values_here.tolist()

    def data_ptr(self) -> int:
        return self.values_here.data_ptr()

    def __repr__(self, **_: Any) -> str:
        return f"Placed({self.values_here}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _values(one: Any) -> Any:
    return one.values_here if isinstance(one, Placed) else one


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the CPU values, and say that the result lies where its inputs do."""
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    # a CPU tensor without dimensions is a number to a card, and CPU indices are taken along
    places = {one.device for one in tensors if one.ndim or isinstance(one, Placed)}
    mixed = len(places) > 1 and function not in _MOVES
    if function in _INDEXING and places - {torch.device("cpu")} == {args[0].device}:
        mixed = False
    if mixed:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, found {sorted(map(str, places))}: {function}"
        )
    if kwargs.get("device") is not None:
        where, kwargs = torch.device(kwargs["device"]), {**kwargs, "device": torch.device("cpu")}
    elif function in _MOVES and tensors:
        where = args[0].device
    else:
        where = next((place for place in places if place.type != "cpu"), torch.device("cpu"))
    found = function(*tree_map(_values, args), **tree_map(_values, kwargs))
    if where.type == "cpu":
        return found
    if function._schema.is_mutable:
        same = next((one for one in tensors if _values(one) is found), None)
        if same is not None:
            return same
    wrap = lambda one: Placed(one, where) if isinstance(one, torch.Tensor) and not isinstance(one, Placed) else one  # noqa: E731
    return tree_map(wrap, found)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class _Factories(TorchFunctionMode):
    """What torch builds past the dispatcher (torch.tensor, indices from lists): here on the CPU, then moved."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            where = kwargs.pop("device")
            args = tree_map(lambda one: one.tolist() if isinstance(one, Placed) else one, args)
            return function(*args, **kwargs).to(where)
        if function is torch.nn.functional.linear and args[0].ndim == 1:  # which changes a shape in place
            return function(args[0][None], *args[1:], **kwargs)[0]
        if function is torch.Tensor.new_tensor:
            return torch.tensor(args[1], dtype=args[0].dtype).to(args[0].device)
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(one, dtype=torch.long) if isinstance(one, list) else one for one in index)
            args = args[0], index, *args[2:]
        return function(*args, **kwargs)


def _mask_of(
    rule: Any, padding: Any, rows: int, keys: int, offset: int, key_offset: int, device: Any, start: Any = None
):
    """Make a mask whose tensor lies on the CPU, since a `Placed` has a class already, and which says where it lies."""
    made = _plain_mask_of(rule, padding, rows, keys, offset, key_offset, torch.device("cpu"), start)
    made.place = torch.device(device)
    return made


_plain_mask_of = RowMask.of


def _is_plain(module: Any) -> bool:
    """A linear layer of the device is plain: only here is the class of its weight another than on a card."""
    weight = getattr(module, "weight", None)
    return (type(module) is torch.nn.Linear and type(weight) is Placed) or linears.is_plain(module)


@contextmanager
def placing() -> Iterator[None]:
    """Let the device exist inside the block."""
    register()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(RowMask, "of", _mask_of))
        stack.enter_context(mock.patch.object(RowMask, "device", property(lambda mask: mask.place), create=True))
        for module in (text_model, part_checks, plain_layers):
            stack.enter_context(mock.patch.object(module, "is_plain", _is_plain))
        stack.enter_context(mock.patch.object(linears, "dequantised", lambda module: linears.weight_of(module)))
        stack.enter_context(_Factories())
        stack.enter_context(_Dispatch())
        yield
