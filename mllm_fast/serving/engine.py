"""The engine: one thread that runs the model for all requests (continuous batching).

Rows join and leave the batch between two forward passes. Between two passes the engine reads at most one image and
does one piece of a side task, which bounds the delay of the answers in progress. The engine never waits for the
readers of the answers.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from ..core.errors import InputError
from ..models.offload import device_of
from .lockstep import WAIT, Lockstep, MakeTask
from .requests import BusyError, FailureEvent, FinishEvent, Generation, SideTask, StoppingError, dropped
from .scheduler import Scheduler

if TYPE_CHECKING:
    from ..context.context import Context
    from ..vlm import VLM


class Engine:  # long: a queue, and the steps of one process or of several
    """Runs generations and side tasks in one thread.

    Args:
        vlm: The model.
        max_batch: The largest number of sequences that are decoded together.
        max_queue: The largest number of requests that may wait for a place, side tasks included.
        keep_context: Called by the engine's thread with the key of each new context and the context. It must not
            block. It returns the context in the form in which the store will return it later.
        held: Returns the stored context of a key, or None.
        at_once: Answer questions about a context that is being made from the whole prefix; otherwise they wait for it.
        make_task: For a model that is divided between processes: makes the pieces of a side task from its order.

    Attributes:
        failure: The exception that ended the engine's thread, or None. Such an engine must be replaced.
        on_failure: Called with that exception, by the engine's thread.

    Raises:
        InputError: `max_batch` or `max_queue` is less than 1.
    """

    def __init__(
        self,
        vlm: VLM,
        *,
        max_batch: int = 64,
        max_queue: int = 256,
        keep_context: Callable[[str, Context], Context] = lambda _, made: made,
        held: Callable[[str], Context | None] = lambda _: None,
        at_once: bool = False,
        make_task: MakeTask | None = None,
    ):
        for name, given in (("max_batch", max_batch), ("max_queue", max_queue)):
            if given < 1:
                raise InputError(f"{name} is at least 1, got {given}")
        self.vlm = vlm
        self.max_queue = max_queue
        self._wake = threading.Condition()
        split = vlm.text.split
        self._lockstep: Lockstep | None = None
        if split is not None:
            self._lockstep = Lockstep(split, make_task or _no_task, device_of(vlm.model))
            keep_context, held = partial(self._keep_and_note, keep_context), lambda _: None
        self._arrived: list[Generation | SideTask] = []  # which the other ranks have not heard of
        self._cancelled: list[Generation | SideTask] = []
        self.scheduler = Scheduler(vlm, max_batch, self._wake, keep_context, held, at_once, self._lockstep)
        self._tasks: deque[SideTask] = deque()
        self._forgotten: deque[str] = deque()
        self._stopping = False
        self.failure: BaseException | None = None
        self.on_failure: Callable[[BaseException], None] = lambda _: None
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the engine takes requests."""
        return self._thread.is_alive() and not self._stopping

    @property
    def waiting(self) -> int:
        """The number of generations that wait for a place in the batch, and of side tasks."""
        return self.scheduler.waiting + len(self._tasks) + len(self._arrived)

    @property
    def running(self) -> int:
        """The number of sequences in the batch."""
        return len(self.scheduler.members)

    @property
    def nbytes(self) -> int:
        """The size of the keys and values in the batch, in bytes."""
        return self.scheduler.batch.nbytes

    def submit(self, wanted: Generation | SideTask) -> None:
        """Queue a generation or a side task. Its sink receives the events.

        Raises:
            BusyError: The queue is full.
            StoppingError: The engine is stopping.
        """
        with self._wake:
            if not self.alive:
                raise StoppingError
            if self.waiting >= self.max_queue:
                raise BusyError
            if self._lockstep is None:
                self._add(wanted)
            elif isinstance(wanted, SideTask) and wanted.order is None:
                raise InputError("a model that is divided between processes does not run this; serve it without --tp")
            else:
                self._arrived.append(wanted)
            self._wake.notify()

    def _add(self, wanted: Generation | SideTask) -> None:
        if isinstance(wanted, Generation):
            self.scheduler.add(wanted)
        else:
            self._tasks.append(wanted)

    def cancel(self, wanted: Generation | SideTask) -> None:
        """Cancel a generation or a side task. Its place is free before the next forward pass."""
        with self._wake:
            if self._lockstep is None:
                wanted.cancelled = True
            else:
                self._cancelled.append(wanted)
            self._wake.notify()

    def forget(self, key: str) -> None:
        """Drop a deleted context from the batch, so that the next question about it builds it again."""
        self._forgotten.append(key)

    def stop(self, timeout: float | None = None) -> bool:
        """Refuse new work, finish the work in progress, and stop the thread.

        Args:
            timeout: How many seconds the work in progress may take; None waits without a limit.

        Returns:
            Whether all work was finished in time. Unfinished work receives a `FailureEvent`.
        """
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if not self._thread.ident:
            if self._lockstep is not None:
                self._lockstep.stop()
            return True
        self._thread.join(timeout)
        done = not self._thread.is_alive()
        if not done:
            self._fail_all(StoppingError())
            self._thread.join(timeout)
        return done

    def _loop(self) -> None:
        try:
            while self._next():
                self._step()
            if self._lockstep is not None:
                self._lockstep.stop()
        except BaseException as error:  # nobody is left waiting, and no new request is taken
            self._stopping = True
            self.failure = error
            self.on_failure(error)
            self._fail_all(error)
            raise

    def _next(self) -> bool:
        """Wait for work, and tell the other ranks of it; return False once the engine stops and nothing is left."""
        with self._wake:
            while not (self._tasks or self.scheduler.busy or self._arrived):
                if self._stopping:
                    return False
                if not self._wake.wait(None if self._lockstep is None else WAIT):
                    break  # the other ranks hear that this one is there
            if self._lockstep is None:
                return True
            arrived, self._arrived = self._arrived, []
            cancelled, self._cancelled = self._cancelled, []
        forgotten = [self._forgotten.popleft() for _ in range(len(self._forgotten))]
        arrived = self._lockstep.tell(arrived, cancelled, forgotten)  # outside the lock: a sink may be called
        self._take(arrived, forgotten)
        return True

    def _take(self, arrived: list[Generation | SideTask], forgotten: list[str]) -> None:
        """Take what all ranks have heard of."""
        for key in forgotten:
            self.scheduler.batch.forget(key)
        with self._wake:
            for wanted in arrived:
                self._add(wanted)

    def _step(self) -> None:
        """Run one forward pass, and one piece of a side task."""
        while self._lockstep is None and self._forgotten:
            self.scheduler.batch.forget(self._forgotten.popleft())
        self.scheduler.admit()
        self.scheduler.run_pass()
        self._run_task()

    def follow(self) -> None:
        """Run the same steps as the first rank, until it stops, in the thread that calls."""
        assert self._lockstep is not None
        while (heard := self._lockstep.hear()) is not None:
            self._take(*heard)
            self._step()

    def _keep_and_note(self, keep: Callable[[str, Context], Context], key: str, made: Context) -> Context:
        kept = keep(key, made)
        assert self._lockstep is not None
        self._lockstep.keep(kept)
        return kept

    def _fail_all(self, error: BaseException) -> None:
        everyone: list[Generation | SideTask] = [*self.scheduler.everyone(), *self._tasks, *self._arrived]
        for one in everyone:
            one.cancelled = True
            one.sink(FailureEvent(error))

    def _run_task(self) -> None:
        """Run one piece of the side task that is next in turn."""
        with self._wake:
            task = self._tasks.popleft() if self._tasks else None
        if task is None:
            return
        if dropped(task):
            if task.pieces is not None:
                with suppress(Exception):  # nobody waits for it
                    task.pieces.close()  # type: ignore[attr-defined]
            return
        try:
            if task.pieces is None:
                task.pieces = task.make()
            piece = next(task.pieces)
        except StopIteration:
            task.sink(FinishEvent("stop"))
            return
        except Exception as error:
            task.sink(FailureEvent(error))
            return
        task.sink(piece)
        with self._wake:
            self._tasks.append(task)


def _no_task(order: dict[str, Any], files: list[bytes]) -> Iterator[Any]:
    raise InputError(f"there is no side task for {order}")
