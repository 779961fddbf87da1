"""Measure the peak memory of the tensors that a call makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def peak_tensor_bytes(run: Callable[[], object]) -> int:
    """Return the largest number of bytes of tensors, made inside `run`, that are alive at once.

    Tensors on all devices and of backward passes count. Tensors from before the call and the scratch memory inside an
    operator do not count.
    """
    with _Alive() as alive:
        run()
    return alive.peak


class _Alive(TorchDispatchMode):
    """A dispatch mode that tracks the storages of every operator's output."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._held = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(found):
            if storage._cdata not in given and storage._cdata not in self._alive:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self._held += storage.nbytes()
        if self._held > self.peak:  # count again, since some storages may be freed by now
            self._alive = {key: one for key, one in self._alive.items() if not one[0].expired()}
            self._held = sum(size for _, size in self._alive.values())
            self.peak = max(self.peak, self._held)
        return found


def _storages(tree: Any) -> Iterator[Any]:
    for leaf in tree_iter(tree):
        if isinstance(leaf, Tensor):
            yield leaf.untyped_storage()
