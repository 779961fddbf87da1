"""Tensor parallelism: which heads and words of a model each process holds, and how the processes exchange them.

Every process runs the same calls on the same inputs. A process, called a rank, holds some query heads with their keys
and values, and some words of the unembedding. The residual stream, the norms and the vision part are whole on each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from math import ceil
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import InputError


def is_sharded(tensor: Any) -> bool:
    """Return whether a tensor is one that torch.distributed divides between processes."""
    module = sys.modules.get("torch.distributed.tensor")  # a tensor that is divided was made by this module
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Any:
    """Return the part of a tensor that this process holds: the tensor itself unless it is divided."""
    return tensor.to_local() if is_sharded(tensor) else tensor


class Placed(NamedTuple):
    """Where a divided tensor's part lies.

    Attributes:
        dim: The dimension along which it is divided.
        start: Where the part begins along it.
        shape: The shape of the whole.
        blocks: How many blocks lie behind one another along the dimension, each of which is divided for itself.
    """

    dim: int
    start: int
    shape: tuple[int, ...]
    blocks: int = 1


def place_of(tensor: Any) -> Placed | None:
    """Return where a divided tensor's part lies, or None for a tensor that this process holds as a whole.

    Raises:
        InputError: The tensor is divided in another way than along one dimension.
    """
    rows = getattr(tensor, "held_rows", None)
    if rows is not None:
        return Placed(0, rows[0], (rows[1], *tensor.shape[1:]))
    if not is_sharded(tensor) or all(one.is_replicate() for one in tensor.placements):
        return None
    way, ranks = tensor.placements[0], tensor.device_mesh.size()
    blocks = getattr(way, "split_factor", 1)  # gate and up projections in one tensor
    if len(tensor.placements) > 1 or not (way.is_shard() or blocks > 1):
        raise InputError(f"a weight {tuple(tensor.shape)} is divided as {tensor.placements}, which is not supported")
    dim = way.dim % tensor.ndim
    start = shares(tensor.shape[dim] // blocks, ranks)[tensor.device_mesh.get_local_rank()].start
    return Placed(dim, start, tuple(tensor.shape), blocks)


@dataclass(frozen=True)
class Split:
    """What the ranks of a text model hold.

    Attributes:
        group: The process group of the ranks.
        control: A group of the same ranks that may wait for a day, in which they meet before a call.
        rank: The number of this rank.
        heads, kv_heads, words: The query heads, the key and value heads and the words of each rank. Ranks that hold the
            same keys and values share a range.
    """

    group: Any
    control: Any
    rank: int
    heads: tuple[range, ...]
    kv_heads: tuple[range, ...]
    words: tuple[range, ...]

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.heads)

    @property
    def my_heads(self) -> range:
        """The query heads of this rank."""
        return self.heads[self.rank]

    @property
    def my_words(self) -> range:
        """The words of this rank."""
        return self.words[self.rank]

    @property
    def words_split(self) -> bool:
        """Whether the ranks hold different words."""
        return len(set(self.words)) > 1

    def owner(self, head: int) -> int:
        """Return the rank that holds a query head."""
        return next(rank for rank, held in enumerate(self.heads) if head in held)

    def gather(self, tensor: Tensor, dim: int, held: Sequence[range] | None = None) -> Tensor:
        """Return what all ranks hold along a dimension, joined in order; the same on every rank.

        Args:
            tensor: What this rank holds.
            dim: The dimension.
            held: What each rank holds along it; by default its query heads. A part that several hold is taken once.
        """
        held = self.heads if held is None else held
        if len(set(held)) == 1:
            return tensor
        first = tensor.movedim(dim, 0)
        longest = max(map(len, held))
        padded = first.new_zeros(longest, *first.shape[1:])
        padded[: len(first)] = first
        parts = self.everyone(padded)
        kept, stop = [], 0
        for part, some in zip(parts, held, strict=True):
            kept.append(part[max(0, stop - some.start) : len(some)])
            stop = max(stop, some.stop)
        return torch.cat(kept).movedim(0, dim)

    def everyone(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the same shape on every rank from all of them, [ranks, ...]."""
        mine = tensor.detach().contiguous()
        every = mine.new_empty(self.size, *mine.shape)
        dist.all_gather(list(every), mine, group=self.group)
        return every

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks."""
        total = tensor.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean over all ranks, that of all heads where each rank gives the mean of its own."""
        return self.sum(tensor) / self.size

    def from_owners(self, tensors: Sequence[Sequence[Tensor]], heads: Sequence[int], like: Sequence[Tensor]) -> Any:
        """Return what the owners of some heads know of them, in one exchange.

        Args:
            tensors: For each of the heads that this rank holds, in order, some tensors.
            heads: The heads; one may be named several times.
            like: Tensors of the shapes, dtypes and device of one head's.

        Returns:
            For each head, its tensors as a list.
        """
        owners = [self.owner(head) for head in heads]
        sizes = [one.numel() * one.element_size() for one in like]
        each = sum(-(-size // 16) * 16 for size in sizes)  # aligned, to be read in place
        most = max(map(owners.count, range(self.size)))
        buffer = torch.zeros(most, each, dtype=torch.uint8, device=like[0].device)
        for row, some in zip(buffer, tensors, strict=False):
            start = 0
            for one, size in zip(some, sizes, strict=True):
                row[start : start + size] = one.to(row.device).contiguous().reshape(-1).view(torch.uint8)
                start += -(-size // 16) * 16
        every, given, found = self.everyone(buffer), [0] * self.size, []
        for owner in owners:
            row, start, some = every[owner, given[owner]], 0, []
            given[owner] += 1
            for one, size in zip(like, sizes, strict=True):
                some.append(row[start : start + size].view(one.dtype).reshape(one.shape))
                start += -(-size // 16) * 16
            found.append(some)
        return found

    def by_first(self, act: Callable[[], str | None]) -> str:
        """Run a function on the first rank alone, and give the text that it returns to all.

        Raises:
            InputError: On every rank, with the message of what the function raised, whatever it was.
        """
        found, raised = "", None
        if self.rank == 0:
            try:
                found = f"+{act() or ''}"
            except Exception as error:  # which the other ranks have to hear of
                found, raised = f"-{error}", error
        found = self.told(found.encode()).decode()
        if raised is not None:
            raise raised
        if found.startswith("-"):
            raise InputError(found[1:])
        return found[1:]

    def told(self, content: bytes = b"") -> bytes:
        """Return the bytes that the first rank gives on every rank; the others wait for them up to a day."""
        size = torch.tensor([len(content)])
        dist.broadcast(size, group=self.control, group_src=0)
        raw = torch.empty(int(size), dtype=torch.uint8)
        if self.rank == 0 and len(content):
            raw.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        dist.broadcast(raw, group=self.control, group_src=0)
        return raw.numpy().tobytes()

    def told_numbers(self, numbers: Sequence[int]) -> list[int]:
        """Return the numbers that the first rank gives on every rank, which all give as many."""
        told = torch.tensor(numbers, dtype=torch.long)
        dist.broadcast(told, group=self.control, group_src=0)
        return told.tolist()

    def meet(self) -> None:
        """Wait until every rank makes this call; a rank that has ended makes it fail at once."""
        dist.barrier(group=self.control)

    def same_random(self) -> None:
        """Give every rank the state of the first rank's random numbers, so that all draw the same."""
        state = torch.get_rng_state()
        dist.broadcast(state, group=self.control, group_src=0)
        torch.set_rng_state(state)
        if torch.cuda.is_available():
            state = torch.cuda.get_rng_state()
            dist.broadcast(state, group=self.control, group_src=0)
            torch.cuda.set_rng_state(state)


_controls: dict[Any, Any] = {}  # by the group that they belong to


def control_group(group: Any) -> Any:
    """Return a group of the ranks of another one whose calls may wait for a day; every rank makes this call."""
    if group not in _controls:
        ranks = dist.get_process_group_ranks(group)
        _controls[group] = dist.new_group(
            ranks, timeout=timedelta(days=1), backend="gloo", use_local_synchronization=True
        )
    return _controls[group]


def by_first(split: Split | None, act: Callable[[], str | None]) -> None:
    """Run a function in the only process, or on the first of several ranks; see `Split.by_first`."""
    if split is None:
        act()
    else:
        split.by_first(act)


def mean_of_heads(values: Tensor, split: Split | None) -> Tensor:
    """Return the mean over all heads of values [H, ...] of the heads of this process."""
    mean = values.mean(0)
    return mean if split is None else split.mean(mean)


def shares(total: int, ranks: int) -> tuple[range, ...]:
    """Return what each rank holds of `total` things, as torch.distributed divides them."""
    size = ceil(total / ranks)
    return tuple(range(min(r * size, total), min((r + 1) * size, total)) for r in range(ranks))


def kv_shares(heads: int, kv_heads: int, ranks: int) -> tuple[range, ...]:
    """Return the key and value heads of each rank: those that its query heads read.

    Raises:
        InputError: Query heads do not divide by the ranks, or neither of key heads and ranks divides by the other.
    """
    if heads % ranks:
        raise InputError(f"{heads} attention heads do not divide by {ranks} processes: take a number that divides them")
    if kv_heads % ranks and ranks % kv_heads:
        raise InputError(
            f"{kv_heads} heads of keys and values and {ranks} processes: one has to divide by the other, so that every"
            " query head lies with its keys; take another number of processes"
        )
    each = heads // ranks
    groups = heads // kv_heads
    return tuple(range(r * each // groups, (r * each + each - 1) // groups + 1) for r in range(ranks))
