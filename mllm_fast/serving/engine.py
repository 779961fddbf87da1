"""One thread that runs the model for all requests: sequences join and leave a batch between two passes.

Between two passes at most one image is read and one piece of other work is done, so that nobody who is being
answered waits for more than that. Nothing here waits for whoever reads the answers.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..core.errors import InputError
from .requests import BusyError, FailureEvent, FinishEvent, Generation, SideTask, StoppingError, dropped
from .scheduler import Scheduler

if TYPE_CHECKING:
    from ..context.context import Context
    from ..vlm import VLM


class Engine:
    """Runs generations and side tasks.

    Args:
        vlm: the model. max_batch: sequences decoded together.
        max_queue: how many may wait for a place, side tasks included.
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
        self.max_queue = max_queue
        self._wake = threading.Condition()
        self.scheduler = Scheduler(vlm, max_batch, self._wake, keep_context, held)
        self._tasks: deque[SideTask] = deque()
        self._forgotten: deque[str] = deque()
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
        """Generations and side tasks without a place."""
        return self.scheduler.waiting + len(self._tasks)

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return len(self.scheduler.members)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values in the batch."""
        return self.scheduler.batch.nbytes

    def submit(self, wanted: Generation | SideTask) -> None:
        """Take a generation or a side task; its sink is told how it goes.

        Raises:
            BusyError: too many wait. StoppingError: the engine is about to stop.
        """
        with self._wake:
            if not self.alive:
                raise StoppingError
            if self.waiting >= self.max_queue:
                raise BusyError
            if isinstance(wanted, Generation):
                self.scheduler.add(wanted)
            else:
                self._tasks.append(wanted)
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
                    while not (self._tasks or self.scheduler.busy):
                        if self._stopping:
                            return
                        self._wake.wait()
                while self._forgotten:
                    self.scheduler.batch.forget(self._forgotten.popleft())
                self.scheduler.admit()
                self.scheduler.run_pass()
                self._run_task()
        except BaseException as error:  # nobody is left waiting, and no more is taken
            self._stopping = True
            self._fail_all(error)
            raise

    def _fail_all(self, error: BaseException) -> None:
        everyone: list[Generation | SideTask] = [*self.scheduler.everyone(), *self._tasks]
        for one in everyone:
            one.cancelled = True
            one.sink(FailureEvent(error))

    def _run_task(self) -> None:
        """One piece of the side task whose turn it is."""
        with self._wake:
            task = self._tasks.popleft() if self._tasks else None
        if task is None:
            return
        if dropped(task):
            if task.pieces is not None:
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
