"""Requests to the engine, and the events with which it reports on them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..core.layout import TokenLayout
from ..runtime.batch import Row
from ..runtime.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from ..context.compress import ContextSizes
    from ..context.context import Context


_TOP = 20  # the most log-probabilities per token that can be requested


class BusyError(Exception):
    """Raised when the engine's queue is full."""


class StoppingError(Exception):
    """Raised when the engine is stopping and takes no new requests."""


@dataclass(frozen=True)
class ContextSpec:
    """How to make a context.

    Attributes:
        inputs: The processor's output for the images and the prompt.
        layout: The layout of the prompt.
        prompt, keep, score, max_tokens, budget: See `VLM.compress`; `max_tokens` is its `max_new_tokens`.
        whole: Keep everything: `inputs` are a prompt's up to its last image token, and the prompt goes on behind it.
    """

    inputs: Any
    layout: TokenLayout
    prompt: str
    keep: float | int
    score: str
    max_tokens: int
    whole: bool = False
    budget: str = "all"


@dataclass(frozen=True)
class TokenEvent:
    """The engine generated a token.

    Attributes:
        token: The id of the token.
        log_prob: Its log-probability, or 0 if none was requested.
        top: The most likely tokens, as (id, log-probability), as many as were requested.
    """

    token: int
    log_prob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class FinishEvent:
    """The generation or side task has ended. The reason is "stop" or "length"."""

    reason: str


@dataclass(frozen=True)
class FailureEvent:
    """The generation or side task has ended with an error."""

    error: BaseException


@dataclass(frozen=True)
class PrefillEvent:
    """The prompt was read.

    Attributes:
        prompt_tokens: The number of tokens of the whole prompt.
        cached: How many of them came from a context that existed already.
        context: The context, for a question about one, or its sizes while it is being made.
    """

    prompt_tokens: int
    cached: int = 0
    context: Context | ContextSizes | None = None


Event = PrefillEvent | TokenEvent | FinishEvent | FailureEvent


class TokenConstraint(Protocol):
    """Which tokens may come next in an answer."""

    def masked(self, logits: Tensor) -> Tensor:
        """Return the logits [V] with those of the tokens that are ruled out at minus infinity."""

    def take(self, token: int) -> None:
        """Go on with a token."""


@dataclass(eq=False)
class Generation:
    """A request for one answer.

    A question about a context sets `key`, `ids`, and `context` or `spec`. A prompt that is read whole sets `inputs` and
    `layout` instead. One with images sets both, and is read whole where the model lets tokens see later ones.

    Attributes:
        sink: Called with every event by the engine's thread. It must not block.
        stop_ids: The token ids that end the answer.
        max_tokens: The largest number of tokens of the answer.
        sampling: How tokens are sampled.
        key: The context's key in the store.
        context: The context, if it exists already.
        spec: How to make the context, if it does not exist.
        ids: The token ids of the turns after the context.
        inputs: The processor's output for a prompt that is read whole.
        layout: The layout of such a prompt.
        constraint: Which tokens may come next, or None for any.
        log_probs: How many of the most likely tokens to report; None reports no log-probabilities.
        deadline: The time, by `time.monotonic`, after which the generation is dropped.
        cancelled: Whether nobody waits for the answer any more.
        cached: Whether the context existed already.
        count: The number of tokens generated so far.
        row: The generation's row in the batch, or None.
        sampler: Chooses the next token.
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
    constraint: TokenConstraint | None = field(default=None, repr=False)
    log_probs: int | None = None
    deadline: float = float("inf")
    cancelled: bool = False
    cached: bool = False
    count: int = 0
    row: Row | None = field(default=None, repr=False)
    sampler: Sampler | None = field(default=None, repr=False)

    def choose(self, logits: Tensor, likeliest: int | None = None) -> int:
        """Return the next token for the logits [V].

        Args:
            logits: The logits.
            likeliest: The token of the largest logit, if it is known.
        """
        assert self.sampler is not None
        if self.constraint is not None:
            token = self.sampler.choose(self.constraint.masked(logits))
            self.constraint.take(token)
            return token
        return likeliest if likeliest is not None and self.sampler.plain else self.sampler.choose(logits)

    def emit(self, token: int, logits: Tensor) -> bool:
        """Send a token to the sink, and return whether the generation goes on."""
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
    """Other work that runs the model, one piece at a time between two forward passes.

    Attributes:
        make: Makes the iterator of pieces. The engine's thread calls it.
        sink: Called with each piece, then with a `FinishEvent` or a `FailureEvent`. It must not block.
        deadline: The time, by `time.monotonic`, after which the task is dropped.
        cancelled: Whether nobody waits for the task any more.
        pieces: The iterator, once it was made.
        order: What the other processes of a divided model make the same iterator of: data for JSON, and the files of
            images.
    """

    make: Callable[[], Iterator[Any]]
    sink: Callable[[Any], None]
    deadline: float = float("inf")
    cancelled: bool = False
    pieces: Iterator[Any] | None = None
    order: tuple[dict[str, Any], list[bytes]] | None = None


def dropped(wanted: Generation | SideTask) -> bool:
    """Return whether a request was cancelled or is past its deadline. If it is late, its sink receives the error."""
    if not wanted.cancelled and time.monotonic() > wanted.deadline:
        wanted.cancelled = True
        wanted.sink(FailureEvent(TimeoutError()))
    return wanted.cancelled
