"""The scheduler: it decides which sequences are in the batch. They join and leave between two forward passes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..runtime.batch import Batch
from ..runtime.prefill import Prefill
from ..runtime.sampling import SamplerCache
from .context_builder import ContextBuilder, ContextBuilders
from .reading import Pace, Reading
from .requests import FailureEvent, FinishEvent, Generation, PrefillEvent, dropped

if TYPE_CHECKING:
    from ..context.context import Context
    from ..vlm import VLM
    from .lockstep import Lockstep


class Scheduler:
    """Admits generations and context builders to the batch and runs the forward passes.

    Only the engine's thread uses it, except for `add`, `waiting` and `everyone`.

    Args:
        vlm: The model.
        max_batch: The largest number of sequences that are decoded together.
        guard: The lock of the queue.
        keep_context: See `Engine`.
        held: See `Engine`.
        at_once: See `Engine`.
        lockstep: What the ranks of a divided model agree by, or None.

    Attributes:
        passes: The number of forward passes so far.
        tokens: The number of tokens decoded in them.
        batch: The keys and values of the sequences that are decoded.
        members: The generations and context builders in the batch.
        builders: The contexts that are being made.
    """

    def __init__(
        self,
        vlm: VLM,
        max_batch: int,
        guard: threading.Condition,
        keep_context: Callable[[str, Context], Context],
        held: Callable[[str], Context | None],
        at_once: bool = False,
        lockstep: Lockstep | None = None,
    ):
        self.vlm, self.max_batch = vlm, max_batch
        self._lockstep = lockstep
        self.passes = self.tokens = 0
        self.batch = Batch(vlm.text, vlm.backend)
        self.members: list[Generation | ContextBuilder] = []
        self._guard = guard
        self._keep_context = keep_context
        self._samplers = SamplerCache(vlm)
        self._queue: deque[Generation] = deque()
        self.builders = ContextBuilders(vlm, self._samplers, held, at_once)
        self.reading: Reading | None = None  # the prompt that is being read
        self._pace = Pace()
        self._divides = True  # whether a prompt can be read in two parts: no token sees a later one

    @property
    def waiting(self) -> int:
        """The number of generations that wait for a place in the batch or for their context."""
        read = int(self.reading is not None and isinstance(self.reading.owner, Generation))
        return read + len(self._queue) + sum(len(one.waiting) for one in list(self.builders.values()))

    @property
    def busy(self) -> bool:
        """Whether any generation waits or runs."""
        return bool(self._queue or self.members or self.builders or self.reading)

    def add(self, wanted: Generation) -> None:
        """Append a generation to the queue. The caller must hold the lock."""
        self._queue.append(wanted)

    def everyone(self) -> list[Generation]:
        """Return all generations that wait or run."""
        waiting = [one for builder in list(self.builders.values()) for one in builder.waiting]
        running = [one for one in self.members if isinstance(one, Generation)]
        if self.reading is not None and isinstance(self.reading.owner, Generation):
            running.append(self.reading.owner)
        return [*self._queue, *running, *waiting]

    def admit(self) -> None:
        """Admit waiting generations to the batch in their order, and read at most one prompt, or a piece of it."""
        with self._guard:  # cancelled and late requests leave the queue even while the batch is full
            self._queue = deque(one for one in self._queue if not dropped(one))
        prefilled = self.reading is not None
        if self.reading is not None:
            self._guarded(self.reading.owner, self._read_on)
        for builder in list(self.builders.values()):
            if not builder.running and not prefilled and len(self.members) < self.max_batch:
                prefilled = True
                self._guarded(builder, self._read_on)
        kept: deque[Generation] = deque()
        while True:
            with self._guard:
                if not self._queue:
                    break
                wanted = self._queue.popleft()
            if self.builders.waits(wanted, self._divides):
                continue
            reads = wanted.context is None and wanted.key not in self.builders  # an image of its own
            full = len(self.members) + (self.reading is not None) >= self.max_batch  # what is read has its place
            if full or (reads and prefilled):
                kept.append(wanted)
                if full:
                    break
                continue
            prefilled = prefilled or reads
            self._guarded(wanted, self._start)
        with self._guard:
            self._queue.extendleft(reversed(kept))

    def _guarded(self, one: Generation | ContextBuilder, do: Callable[[Any], None]) -> None:
        """Run a step of one generation or builder. An exception fails it alone."""
        try:
            do(one)
        except Exception as error:
            self._failed(one, error)

    def _failed(self, one: Generation | ContextBuilder, error: Exception) -> None:
        """End a generation, or a builder and the generations that wait for it, with an error."""
        if one.row is not None:
            self._leave(one)
        if self.reading is not None and self.reading.owner is one:
            self.reading = None
        if isinstance(one, ContextBuilder):
            self.builders.pop(one.key, None)
        for waiting in one.waiting if isinstance(one, ContextBuilder) else [one]:
            waiting.sink(FailureEvent(error))

    def _start(self, wanted: Generation) -> None:
        if wanted.context is not None:
            context = wanted.context
            sequence = [*context.input_ids.tolist(), *wanted.ids]
            wanted.inputs = None
            shown = None if context.settings["keep"] == "off" else context
            wanted.sink(PrefillEvent(len(sequence), context.prefix_length if wanted.cached else 0, shown))
            if not wanted.max_tokens:  # only the context was requested
                wanted.sink(FinishEvent("length"))
                return
            wanted.sampler = self._samplers.make(sequence, wanted.sampling)
            asked = context.questions
            wanted.row = self.batch.join(asked.keys, asked.values, context.position, wanted.ids, wanted.key)
            self.members.append(wanted)
            return
        builder = self.builders.get(wanted.key)
        if builder is not None and builder.row is not None:  # from the whole prefix of a context that is being made
            length, sequence = len(builder.sequence), [*builder.sequence, *wanted.ids]
            wanted.inputs = None
            wanted.sink(PrefillEvent(len(sequence), length if builder.asked else 0, builder.announced))
            builder.asked += 1
            wanted.sampler = self._samplers.make(sequence, wanted.sampling)
            keys, values = self.batch.prefix(builder.row)
            wanted.row = self.batch.join(keys, values, builder.position, wanted.ids, (builder.key, "whole"))
            self.members.append(wanted)
            return
        self._read_on(wanted)

    def _read_on(self, owner: Generation | ContextBuilder) -> None:
        """Read the prompt of a generation or a builder: all of it, or a piece if others wait for their next token."""
        if isinstance(owner, ContextBuilder):
            owner.drop_cancelled(dropped)
        if not owner.waiting if isinstance(owner, ContextBuilder) else dropped(owner):
            self.reading = None
            if isinstance(owner, ContextBuilder):
                del self.builders[owner.key]
            return
        if self.reading is None:
            self.reading = Reading.of(self.vlm, owner)
        assert self.reading.owner is owner
        first = self._pace.read(self.reading.pieces, alone=not self.members)
        if first is None:
            return
        self.reading = None
        if isinstance(owner, ContextBuilder):
            self._begun(owner, first)
            return
        owner.sampler = self._samplers.make(first.input_ids.tolist(), owner.sampling)
        owner.sink(PrefillEvent(first.layout.length))
        token = _chosen(self._lockstep, partial(owner.choose, first.logits))
        if owner.emit(token, first.logits):
            owner.row = self.batch.join(first.keys, first.values, first.position, [token])
            self.members.append(owner)

    def _begun(self, builder: ContextBuilder, first: Prefill) -> None:
        builder.begun(first)
        if builder.spec.whole and not first.causal:
            self._divides = False
            del self.builders[builder.key]
            with self._guard:
                self._queue.extendleft(reversed(builder.waiting))
            return
        if builder.done:
            self._built(builder)
            return
        row = self.batch.join(first.keys, first.values, first.position, builder.said[-1:], watch=True)
        builder.joined(row)
        self.members.append(builder)
        if not self.builders.at_once:
            return
        with self._guard:  # they are admitted next, and answered from the whole prefix
            builder.owed = [one for one in builder.waiting if one.max_tokens]
            self._queue.extendleft(reversed(builder.owed))
        builder.waiting = [one for one in builder.waiting if not one.max_tokens]

    def _built(self, builder: ContextBuilder) -> None:
        """Store a finished context, and put the generations that waited for it at the front of the queue."""
        made = builder.context(None if builder.row is None else self.batch.prefix(builder.row))
        context = self._keep_context(builder.key, made)
        if builder.row is not None:
            self._leave(builder)
            self.batch.forget((builder.key, "whole"))
        del self.builders[builder.key]
        for i, wanted in enumerate(builder.waiting):
            wanted.context, wanted.cached = context, i > 0
        with self._guard:
            self._queue.extendleft(reversed(builder.waiting))

    def _leave(self, one: Generation | ContextBuilder) -> None:
        row, one.row = one.row, None
        self.members.remove(one)
        try:
            self.batch.leave(row)  # type: ignore[arg-type]
        except Exception as error:  # the rows are no longer known: those that are in the batch fail
            self.batch = Batch(self.vlm.text, self.vlm.backend)
            members, self.members = self.members, []
            for other in members:
                other.row = None
                self._failed(other, error)

    def run_pass(self) -> None:
        """Run one forward pass of the batch, and take a token for each row."""
        for one in list(self.members):
            if isinstance(one, ContextBuilder):
                one.drop_cancelled(dropped)
                if not (one.waiting or one.owed or one.asked) and one.row is not None:
                    del self.builders[one.key]
                    self._leave(one)
            elif dropped(one) and one.row is not None:
                self._leave(one)
        if not self.members:
            return
        self._pace.begin()
        by_row = {id(one.row): one for one in self.members}
        members = [by_row[id(row)] for row in self.batch.rows]
        with self.batch.running():
            members, logits, failed = _read(self.batch, members)
        self._pace.end()
        for one, error in failed:
            self._failed(one, error)
        if not members:
            return
        likeliest = logits.argmax(-1).tolist()
        if self._lockstep is not None:
            likeliest = self._lockstep.likeliest(likeliest)
        self.passes += 1
        self.tokens += len(members)
        for i, one in enumerate(members):
            self._guarded(one, partial(self._go_on, likeliest=likeliest[i], logits=logits[i]))

    def _go_on(self, one: Generation | ContextBuilder, likeliest: int, logits: Tensor) -> None:
        """Take the next token of a member."""
        assert one.row is not None
        if isinstance(one, ContextBuilder):
            if one.take(likeliest if one.plain else one.choose(logits)):
                one.row.unread = one.said[-1:]
            else:
                self._built(one)
            return
        token = likeliest
        if one.constraint is not None or not one.sampler.plain:  # type: ignore[union-attr]
            token = _chosen(self._lockstep, partial(one.choose, logits, likeliest))
        if one.emit(token, logits):
            one.row.unread = [token]
        else:
            self._leave(one)


def _chosen(lockstep: Lockstep | None, choose: Callable[[], int]) -> int:
    """Return the token that a function chooses, on the first rank if there are several."""
    return choose() if lockstep is None else lockstep.chosen(choose)


_Members = list[Generation | ContextBuilder]


def _read(
    batch: Batch, members: _Members
) -> tuple[_Members, Tensor, list[tuple[Generation | ContextBuilder, Exception]]]:
    """Run a forward pass of members of a batch.

    If it fails, halves are tried, so that a member that makes it fail is the only one that ends. A pass that needs too
    much memory is split in the same way.

    Returns:
        The members that were read, the logits of each, and those that were not, with the reason.
    """
    try:
        return members, batch.read([one.row for one in members]), []  # type: ignore[misc]
    except Exception as error:
        if len(members) == 1:
            return [], torch.empty(0), [(members[0], error)]
    half = len(members) // 2
    parts = [_read(batch, some) for some in (members[:half], members[half:])]
    read = [(some, logits) for some, logits, _ in parts if some]
    return (
        [one for some, _ in read for one in some],
        torch.cat([logits for _, logits in read]) if read else torch.empty(0),
        [one for _, _, failed in parts for one in failed],
    )
