"""One thread that runs the model for all requests: sequences join and leave a batch between two passes.

Between two passes at most one picture is read and one piece of other work is done, so that nobody who is being
answered waits for more than that. Nothing here waits for whoever reads the answers.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.errors import InputError
from ..runtime.batch import Batch
from ..runtime.prefill import prefill
from ..runtime.sampling import SamplerCache
from .context_builder import ContextBuilder
from .requests import (
    BusyError,
    FailureEvent,
    FinishEvent,
    Generation,
    PrefillEvent,
    SideTask,
    StoppingError,
    TokenEvent,
)

if TYPE_CHECKING:
    from ..context.context import Context
    from ..vlm import VLM

_TOP = 20  # log-probabilities that can be asked for


class Engine:
    """Runs generations and other work.

    Args:
        vlm: the model. max_batch: sequences decoded together. max_queue: that may wait for a place, works included.
        keep_context: told of each context that was made, with its key, by the engine's thread; must not wait. Returns
            the context as it will be found again. held: a context that was kept, by its key.
    """

    def __init__(
        self,
        vlm: VLM,
        *,
        max_batch: int = 64,
        max_queue: int = 256,
        keep_context: Callable[[str, Context], Context] = lambda _, made: made,
        held: Callable[[str], Context | None] = lambda _: None,
    ):
        for name, given in (("max_batch", max_batch), ("max_queue", max_queue)):
            if given < 1:
                raise InputError(f"{name} is at least 1, got {given}")
        self.vlm = vlm
        self.max_batch, self.max_queue = max_batch, max_queue
        self.passes = self.tokens = 0
        self._keep_context, self._held = keep_context, held
        self._choosers = SamplerCache(vlm)
        self._batch = Batch(vlm.text, vlm.backend)
        self._queue: deque[Generation] = deque()
        self._works: deque[SideTask] = deque()
        self._builders: dict[str, ContextBuilder] = {}
        self._forgotten: deque[str] = deque()
        self._running: list[Generation | ContextBuilder] = []
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._stopping

    @property
    def waiting(self) -> int:
        """Generations and works without a place."""
        return len(self._queue) + len(self._works) + sum(len(one.waiting) for one in list(self._builders.values()))

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values in the batch."""
        return self._batch.nbytes

    def submit(self, wanted: Generation | SideTask) -> None:
        """Take a generation or a work; its sink is told how it goes.

        Raises:
            BusyError: too many wait. StoppingError: the engine is about to stop.
        """
        with self._wake:
            if not self.alive:
                raise StoppingError
            if self.waiting >= self.max_queue:
                raise BusyError
            if isinstance(wanted, Generation):
                self._queue.append(wanted)
            else:
                self._works.append(wanted)
            self._wake.notify()

    def cancel(self, wanted: Generation | SideTask) -> None:
        """Nobody waits for it any more: its place is free before the next pass."""
        wanted.cancelled = True
        with self._wake:
            self._wake.notify()

    def forget(self, key: str) -> None:
        """A context that was deleted: the next question about it makes it anew."""
        self._forgotten.append(key)

    def stop(self, timeout: float | None = None) -> bool:
        """Refuse what comes, finish what there is; whether all was finished within `timeout` seconds. What is left is
        told that the engine stopped."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if not self._thread.ident:
            return True
        self._thread.join(timeout)
        done = not self._thread.is_alive()
        if not done:
            self._fail_all(StoppingError())
            self._thread.join(timeout)
        return done

    def _loop(self) -> None:
        try:
            while True:
                with self._wake:
                    while not (self._queue or self._works or self._running or self._builders):
                        if self._stopping:
                            return
                        self._wake.wait()
                while self._forgotten:
                    self._batch.forget(self._forgotten.popleft())
                self._admit()
                self._pass()
                self._piece()
        except BaseException as error:  # nobody is left waiting, and no more is taken
            self._stopping = True
            self._fail_all(error)
            raise

    def _fail_all(self, error: BaseException) -> None:
        waiting = [one for builder in list(self._builders.values()) for one in builder.waiting]
        for one in [*self._queue, *self._works, *self._running, *waiting]:
            if not isinstance(one, ContextBuilder):  # which goes with those who wait for it
                one.cancelled = True
                one.sink(FailureEvent(error))

    def _admit(self) -> None:
        """Give places to those who wait, in their order; read at most one picture."""
        with self._wake:  # who gave up, or waited too long, leaves the queue even while nobody gets a place
            self._queue = deque(one for one in self._queue if not self._dropped(one))
        prefilled = False
        for builder in list(self._builders.values()):
            if not builder.running and not prefilled and len(self._running) < self.max_batch:
                prefilled = True
                self._begin_building(builder)
        kept: deque[Generation] = deque()
        while True:
            with self._wake:
                if not self._queue:
                    break
                wanted = self._queue.popleft()
            if wanted.spec is not None and wanted.context is None:
                wanted.context = self._held(wanted.key)  # it may have been made since the request was read
                wanted.cached = wanted.context is not None
            if wanted.spec is not None and wanted.context is None:
                if wanted.key not in self._builders:
                    self._builders[wanted.key] = ContextBuilder(self.vlm, wanted.key, wanted.spec, self._choosers)
                self._builders[wanted.key].waiting.append(wanted)
                continue
            if len(self._running) >= self.max_batch or (wanted.context is None and prefilled):
                kept.append(wanted)
                if len(self._running) >= self.max_batch:
                    break
                continue
            prefilled = prefilled or wanted.context is None
            self._guarded(wanted, self._join)
        with self._wake:
            self._queue.extendleft(reversed(kept))

    def _dropped(self, wanted: Generation | SideTask) -> bool:
        """Whether nobody waits for it, or it came too late."""
        if not wanted.cancelled and time.monotonic() > wanted.deadline:
            wanted.cancelled = True
            wanted.sink(FailureEvent(TimeoutError()))
        return wanted.cancelled

    def _guarded(self, wanted: Generation, do: Callable[[Generation], None]) -> None:
        """What goes wrong with one of them is told to it alone."""
        try:
            do(wanted)
        except Exception as error:
            if wanted.row is not None:
                self._leave(wanted)
            wanted.sink(FailureEvent(error))

    def _join(self, wanted: Generation) -> None:
        if wanted.context is not None:
            context = wanted.context
            sequence = [*context.input_ids.tolist(), *wanted.ids]
            wanted.sink(PrefillEvent(len(sequence), context.prefix_length if wanted.cached else 0, context))
            if not wanted.max_tokens:  # the context was all that was wanted
                wanted.sink(FinishEvent("length"))
                return
            wanted.sampler = self._choosers.make(sequence, wanted.sampling)
            wanted.row = self._batch.join(context.keys, context.values, context.position, wanted.ids, wanted.key)
            self._running.append(wanted)
            return
        assert wanted.layout is not None
        first = prefill(self.vlm, wanted.inputs, wanted.layout)
        wanted.inputs = None
        wanted.sampler = self._choosers.make(first.input_ids.tolist(), wanted.sampling)
        wanted.sink(PrefillEvent(wanted.layout.length))
        token = wanted.sampler.choose(first.logits)
        if self._say(wanted, token, first.logits):
            wanted.row = self._batch.join(first.keys, first.values, first.position, [token])
            self._running.append(wanted)

    def _begin_building(self, builder: ContextBuilder) -> None:
        builder.drop_cancelled(self._dropped)
        if not builder.waiting:
            del self._builders[builder.key]
            return
        try:
            first = builder.begin()
            if builder.done:
                self._made(builder)
            else:
                row = self._batch.join(first.keys, first.values, first.position, builder.said[-1:], watch=True)
                builder.joined(row)
                self._running.append(builder)
        except Exception as error:
            self._not_made(builder, error)

    def _made(self, builder: ContextBuilder) -> None:
        """Everybody who waited for the context asks it now, before those who came later."""
        try:
            made = builder.context(None if builder.row is None else self._batch.prefix(builder.row))
            context = self._keep_context(builder.key, made)
        except Exception as error:
            self._not_made(builder, error)
            return
        if builder.row is not None:
            self._leave(builder)
        del self._builders[builder.key]
        for i, wanted in enumerate(builder.waiting):
            wanted.context, wanted.cached = context, i > 0
        with self._wake:
            self._queue.extendleft(reversed(builder.waiting))

    def _not_made(self, builder: ContextBuilder, error: Exception) -> None:
        if builder.row is not None:
            self._leave(builder)
        self._builders.pop(builder.key, None)
        for wanted in builder.waiting:
            wanted.sink(FailureEvent(error))

    def _leave(self, one: Generation | ContextBuilder) -> None:
        self._batch.leave(one.row)  # type: ignore[arg-type]
        one.row = None
        self._running.remove(one)

    def _pass(self) -> None:
        """One pass over the batch."""
        for one in list(self._running):
            if isinstance(one, ContextBuilder):
                one.drop_cancelled(self._dropped)
                if not one.waiting:
                    self._leave(one)
                    del self._builders[one.key]
            elif self._dropped(one):
                self._leave(one)
        if not self._running:
            return
        by_row = {id(one.row): one for one in self._running}
        members = [by_row[id(row)] for row in self._batch.rows]
        try:
            with torch.inference_mode(), self._batch.recording():
                logits = self._batch.read()
            likeliest = logits.argmax(-1).tolist()
        except Exception as error:  # out of memory, say: of all in the batch nobody can go on
            for one in members:
                self._leave(one)
                if isinstance(one, ContextBuilder):
                    self._not_made(one, error)
                else:
                    one.sink(FailureEvent(error))
            return
        self.passes += 1
        self.tokens += len(members)
        for i, one in enumerate(members):
            if isinstance(one, ContextBuilder):
                if one.take(likeliest[i] if one.plain else one.choose(logits[i])):
                    one.row.unread = one.said[-1:]  # type: ignore[union-attr]
                else:
                    self._made(one)
            else:
                self._guarded(one, partial(self._go_on, likeliest=likeliest[i], logits=logits[i]))

    def _go_on(self, wanted: Generation, likeliest: int, logits: Tensor) -> None:
        sampler = wanted.sampler
        assert sampler is not None
        assert wanted.row is not None
        token = likeliest if sampler.plain else sampler.choose(logits)
        if self._say(wanted, token, logits):
            wanted.row.unread = [token]
        else:
            self._leave(wanted)

    def _say(self, wanted: Generation, token: int, logits: Tensor) -> bool:
        """Tell of a token; whether there is to be another."""
        if token in wanted.stop_ids:
            wanted.sink(FinishEvent("stop"))
            return False
        wanted.sampler.ids.append(token)  # type: ignore[union-attr]
        wanted.count += 1
        log_prob, top = 0.0, ()
        if wanted.log_probs is not None:
            logs = torch.log_softmax(logits.float(), -1)
            log_prob = float(logs[token])
            best = logs.topk(min(wanted.log_probs, _TOP, len(logs)))
            top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))  # type: ignore[assignment]
        wanted.sink(TokenEvent(token, log_prob, top))
        if wanted.count >= wanted.max_tokens:
            wanted.sink(FinishEvent("length"))
            return False
        return True

    def _piece(self) -> None:
        """One piece of the work whose turn it is."""
        with self._wake:
            work = self._works.popleft() if self._works else None
        if work is None:
            return
        if self._dropped(work):
            if work.pieces is not None:
                work.pieces.close()  # type: ignore[attr-defined]
            return
        try:
            if work.pieces is None:
                work.pieces = work.make()
            piece = next(work.pieces)
        except StopIteration:
            work.sink(FinishEvent("stop"))
            return
        except Exception as error:
            work.sink(FailureEvent(error))
            return
        work.sink(piece)
        with self._wake:
            self._works.append(work)
