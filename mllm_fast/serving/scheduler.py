"""The scheduler: it decides which sequences are in the batch. They join and leave between two forward passes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..runtime.batch import Batch
from ..runtime.prefill import prefill
from ..runtime.sampling import SamplerCache
from .context_builder import ContextBuilder
from .requests import FailureEvent, FinishEvent, Generation, PrefillEvent, dropped

if TYPE_CHECKING:
    from ..context.context import Context
    from ..vlm import VLM


class Scheduler:
    """Admits generations and context builders to the batch and runs the forward passes.

    Only the engine's thread uses it, except for `add`, `waiting` and `everyone`.

    Args:
        vlm: The model.
        max_batch: The largest number of sequences that are decoded together.
        guard: The lock of the queue.
        keep_context: See `Engine`.
        held: See `Engine`.

    Attributes:
        passes: The number of forward passes so far.
        tokens: The number of tokens decoded in them.
        batch: The keys and values of the sequences that are decoded.
        members: The generations and context builders in the batch.
    """

    def __init__(
        self,
        vlm: VLM,
        max_batch: int,
        guard: threading.Condition,
        keep_context: Callable[[str, Context], Context],
        held: Callable[[str], Context | None],
    ):
        self.vlm, self.max_batch = vlm, max_batch
        self.passes = self.tokens = 0
        self.batch = Batch(vlm.text, vlm.backend)
        self.members: list[Generation | ContextBuilder] = []
        self._guard = guard
        self._keep_context, self._held = keep_context, held
        self._samplers = SamplerCache(vlm)
        self._queue: deque[Generation] = deque()
        self._builders: dict[str, ContextBuilder] = {}

    @property
    def waiting(self) -> int:
        """The number of generations that wait for a place in the batch or for their context."""
        return len(self._queue) + sum(len(one.waiting) for one in list(self._builders.values()))

    @property
    def busy(self) -> bool:
        """Whether any generation waits or runs."""
        return bool(self._queue or self.members or self._builders)

    def add(self, wanted: Generation) -> None:
        """Append a generation to the queue. The caller must hold the lock."""
        self._queue.append(wanted)

    def everyone(self) -> list[Generation]:
        """Return all generations that wait or run."""
        waiting = [one for builder in list(self._builders.values()) for one in builder.waiting]
        running = [one for one in self.members if isinstance(one, Generation)]
        return [*self._queue, *running, *waiting]

    def admit(self) -> None:
        """Admit waiting generations to the batch in their order, and run at most one image prefill."""
        with self._guard:  # cancelled and late requests leave the queue even while the batch is full
            self._queue = deque(one for one in self._queue if not dropped(one))
        prefilled = False
        for builder in list(self._builders.values()):
            if not builder.running and not prefilled and len(self.members) < self.max_batch:
                prefilled = True
                self._begin_building(builder)
        kept: deque[Generation] = deque()
        while True:
            with self._guard:
                if not self._queue:
                    break
                wanted = self._queue.popleft()
            if wanted.spec is not None and wanted.context is None:
                wanted.context = self._held(wanted.key)  # it may have been built since the request was prepared
                wanted.cached = wanted.context is not None
            if wanted.spec is not None and wanted.context is None:
                if wanted.key not in self._builders:
                    self._builders[wanted.key] = ContextBuilder(self.vlm, wanted.key, wanted.spec, self._samplers)
                self._builders[wanted.key].waiting.append(wanted)
                continue
            if len(self.members) >= self.max_batch or (wanted.context is None and prefilled):
                kept.append(wanted)
                if len(self.members) >= self.max_batch:
                    break
                continue
            prefilled = prefilled or wanted.context is None
            self._guarded(wanted, self._start)
        with self._guard:
            self._queue.extendleft(reversed(kept))

    def _guarded(self, wanted: Generation, do: Callable[[Generation], None]) -> None:
        """Run a step of one generation. An exception fails this generation only."""
        try:
            do(wanted)
        except Exception as error:
            if wanted.row is not None:
                self._leave(wanted)
            wanted.sink(FailureEvent(error))

    def _start(self, wanted: Generation) -> None:
        if wanted.context is not None:
            context = wanted.context
            sequence = [*context.input_ids.tolist(), *wanted.ids]
            wanted.sink(PrefillEvent(len(sequence), context.prefix_length if wanted.cached else 0, context))
            if not wanted.max_tokens:  # only the context was requested
                wanted.sink(FinishEvent("length"))
                return
            wanted.sampler = self._samplers.make(sequence, wanted.sampling)
            asked = context.questions
            wanted.row = self.batch.join(asked.keys, asked.values, context.position, wanted.ids, wanted.key)
            self.members.append(wanted)
            return
        assert wanted.layout is not None
        first = prefill(self.vlm, wanted.inputs, wanted.layout)
        wanted.inputs = None
        wanted.sampler = self._samplers.make(first.input_ids.tolist(), wanted.sampling)
        wanted.sink(PrefillEvent(wanted.layout.length))
        token = wanted.sampler.choose(first.logits)
        if wanted.emit(token, first.logits):
            wanted.row = self.batch.join(first.keys, first.values, first.position, [token])
            self.members.append(wanted)

    def _begin_building(self, builder: ContextBuilder) -> None:
        builder.drop_cancelled(dropped)
        if not builder.waiting:
            del self._builders[builder.key]
            return
        try:
            first = builder.begin()
            if builder.done:
                self._built(builder)
            else:
                row = self.batch.join(first.keys, first.values, first.position, builder.said[-1:], watch=True)
                builder.joined(row)
                self.members.append(builder)
        except Exception as error:
            self._not_built(builder, error)

    def _built(self, builder: ContextBuilder) -> None:
        """Store a finished context, and put the generations that waited for it at the front of the queue."""
        try:
            made = builder.context(None if builder.row is None else self.batch.prefix(builder.row))
            context = self._keep_context(builder.key, made)
        except Exception as error:
            self._not_built(builder, error)
            return
        if builder.row is not None:
            self._leave(builder)
        del self._builders[builder.key]
        for i, wanted in enumerate(builder.waiting):
            wanted.context, wanted.cached = context, i > 0
        with self._guard:
            self._queue.extendleft(reversed(builder.waiting))

    def _not_built(self, builder: ContextBuilder, error: Exception) -> None:
        if builder.row is not None:
            self._leave(builder)
        self._builders.pop(builder.key, None)
        for wanted in builder.waiting:
            wanted.sink(FailureEvent(error))

    def _leave(self, one: Generation | ContextBuilder) -> None:
        row, one.row = one.row, None
        self.members.remove(one)
        try:
            self.batch.leave(row)  # type: ignore[arg-type]
        except Exception as error:
            self._begin_again(error)

    def _begin_again(self, error: Exception) -> None:
        """Take a new batch in place of one whose rows are no longer known; those that were in it fail."""
        self.batch = Batch(self.vlm.text, self.vlm.backend)
        members, self.members = self.members, []
        for one in members:
            one.row = None
            if isinstance(one, ContextBuilder):
                self._not_built(one, error)
            else:
                one.sink(FailureEvent(error))

    def run_pass(self) -> None:
        """Run one forward pass of the batch, and take a token for each row."""
        for one in list(self.members):
            if isinstance(one, ContextBuilder):
                one.drop_cancelled(dropped)
                if not one.waiting and one.row is not None:
                    del self._builders[one.key]
                    self._leave(one)
            elif dropped(one) and one.row is not None:
                self._leave(one)
        if not self.members:
            return
        by_row = {id(one.row): one for one in self.members}
        members = [by_row[id(row)] for row in self.batch.rows]
        with self.batch.recording():
            members, logits = self._read(members)
        if not members:
            return
        likeliest = logits.argmax(-1).tolist()
        self.passes += 1
        self.tokens += len(members)
        for i, one in enumerate(members):
            if isinstance(one, ContextBuilder):
                self._describe_on(one, likeliest[i], logits[i])
            else:
                self._guarded(one, partial(self._go_on, likeliest=likeliest[i], logits=logits[i]))

    def _read(self, members: list[Generation | ContextBuilder]) -> tuple[list[Generation | ContextBuilder], Tensor]:
        """Run a forward pass, and return the members that it read with the logits of each.

        If it fails, halves are tried, so that a member that makes it fail is the only one that ends. So does a pass
        that needs too much memory.
        """
        try:
            return members, self.batch.read([one.row for one in members])  # type: ignore[misc]
        except Exception as error:
            if len(members) == 1:
                self._failed(members[0], error)
                return [], torch.empty(0)
        half = len(members) // 2
        (first, one), (second, other) = self._read(members[:half]), self._read(members[half:])
        if not first or not second:
            return first + second, one if first else other
        return first + second, torch.cat([one, other])

    def _failed(self, one: Generation | ContextBuilder, error: Exception) -> None:
        if isinstance(one, ContextBuilder):
            self._not_built(one, error)
            return
        self._leave(one)
        one.sink(FailureEvent(error))

    def _describe_on(self, builder: ContextBuilder, likeliest: int, logits: Tensor) -> None:
        try:
            goes_on = builder.take(likeliest if builder.plain else builder.choose(logits))
        except Exception as error:
            self._not_built(builder, error)
            return
        if goes_on:
            builder.row.unread = builder.said[-1:]  # type: ignore[union-attr]
        else:
            self._built(builder)

    def _go_on(self, wanted: Generation, likeliest: int, logits: Tensor) -> None:
        sampler = wanted.sampler
        assert sampler is not None
        assert wanted.row is not None
        token = likeliest if sampler.plain else sampler.choose(logits)
        if wanted.emit(token, logits):
            wanted.row.unread = [token]
        else:
            self._leave(wanted)
