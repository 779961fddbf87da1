"""What is asked of the engine, and what it tells of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.layout import TokenLayout
from ..runtime.batch import Row
from ..runtime.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from ..context.context import Context


_TOP = 20  # log-probabilities that can be asked for


class BusyError(Exception):
    """The queue is full."""


class StoppingError(Exception):
    """Nothing new is begun."""


@dataclass(frozen=True)
class ContextSpec:
    """How a context is made: the images, as the processor gives them to the model, and the arguments of
    `VLM.compress`."""

    inputs: Any
    layout: TokenLayout
    prompt: str
    keep: float | int
    score: str
    max_tokens: int


@dataclass(frozen=True)
class TokenEvent:
    """A token: its id, its log-probability and the likeliest ones [(id, log-probability)], as far as asked for."""

    token: int
    log_prob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class FinishEvent:
    """No more tokens: "stop" or "length"."""

    reason: str


@dataclass(frozen=True)
class FailureEvent:
    """No more tokens, because of an error."""

    error: BaseException


@dataclass(frozen=True)
class PrefillEvent:
    """The prompt was read. `cached`: from a context that was there; `prompt_tokens`: of the whole sequence."""

    prompt_tokens: int
    cached: int = 0
    context: Context | None = None


Event = PrefillEvent | TokenEvent | FinishEvent | FailureEvent


@dataclass(eq=False)
class Generation:
    """One answer that is wanted.

    Args:
        sink: told of every event, by the engine's thread; must not wait.
        key, context, spec, ids: of a question about a context: its name in the store, the context if it is there, how
            to make it if it is not, and the tokens of the turns behind it.
        inputs, layout: of a prompt that is read whole.
        log_probs: how many of the likeliest tokens to report, None for no log-probability at all.
        deadline: by `time.monotonic`.
    """

    sink: Callable[[Event], None]
    stop_ids: set[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    key: str = ""
    context: Context | None = None
    spec: ContextSpec | None = None
    ids: list[int] = field(default_factory=list)
    inputs: Any = None
    layout: TokenLayout | None = None
    log_probs: int | None = None
    deadline: float = float("inf")
    cancelled: bool = False
    cached: bool = False
    count: int = 0
    row: Row | None = field(default=None, repr=False)
    sampler: Sampler | None = field(default=None, repr=False)

    def emit(self, token: int, logits: Tensor) -> bool:
        """Tell of a token; whether there is to be another."""
        if token in self.stop_ids:
            self.sink(FinishEvent("stop"))
            return False
        self.sampler.ids.append(token)  # type: ignore[union-attr]
        self.count += 1
        log_prob, top = 0.0, ()
        if self.log_probs is not None:
            logs = torch.log_softmax(logits.float(), -1)
            log_prob = float(logs[token])
            best = logs.topk(min(self.log_probs, _TOP, len(logs)))
            top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))  # type: ignore[assignment]
        self.sink(TokenEvent(token, log_prob, top))
        if self.count >= self.max_tokens:
            self.sink(FinishEvent("length"))
            return False
        return True


@dataclass(eq=False)
class SideTask:
    """Anything else that runs the model, a piece at a time: `pieces` is made and advanced by the engine's thread.
    `sink` is told of what each piece gives, then of FinishEvent or FailureEvent."""

    make: Callable[[], Iterator[Any]]
    sink: Callable[[Any], None]
    deadline: float = float("inf")
    cancelled: bool = False
    pieces: Iterator[Any] | None = None


def dropped(wanted: Generation | SideTask) -> bool:
    """Whether nobody waits for it any more, or it came too late, which it is told."""
    if not wanted.cancelled and time.monotonic() > wanted.deadline:
        wanted.cancelled = True
        wanted.sink(FailureEvent(TimeoutError()))
    return wanted.cancelled
