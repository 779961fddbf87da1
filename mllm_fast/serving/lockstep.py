"""A server whose model is divided between processes: every rank runs the same engine, step by step.

The first rank takes the requests. Before each step of its engine it tells the others what has come since the last one:
new requests with their prepared inputs, requests that nobody waits for any more, and contexts that may be freed. So the
schedulers of all ranks make the same decisions, and every rank has the keys and values of its own heads. Whatever
depends on chance or on the clock is decided by the first rank: which token follows, and who is late.

What is told is a file of safetensors in memory, with JSON as its metadata.
"""

from __future__ import annotations

import json
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..core.errors import InputError
from ..core.layout import TokenLayout, images_of, plain_images
from ..core.split import Split
from ..runtime.sampling import Sampling
from .requests import ContextSpec, FailureEvent, FinishEvent, Generation, SideTask

if TYPE_CHECKING:
    from ..context.context import Context

WAIT = 3600.0  # seconds after which an idle first rank tells the others that it is there
_FAILED = -1  # a token that could not be chosen
_Tensors = dict[str, Tensor]
MakeTask = Callable[[dict[str, Any], list[bytes]], Iterator[Any]]  # the order of a side task, and its images' files


class Lockstep:
    """What one rank of an engine tells the others, or hears.

    Args:
        split: The ranks.
        make_task: Makes the pieces of a side task from its order, on the ranks that hear of it.
        device: Where the model takes its inputs.
    """

    def __init__(self, split: Split, make_task: MakeTask, device: torch.device):
        self._split, self._make_task, self._device = split, make_task, device
        self.leads = split.rank == 0
        self._count = 0  # of requests
        self._known: dict[int, Generation | SideTask] = {}
        self._numbers: dict[int, int] = {}  # of requests, by their identity
        self._late: dict[int, float] = {}  # when a request is late
        self._kept = 0  # contexts
        self._contexts: dict[int, Context] = {}  # on the ranks that hear
        self._named: weakref.WeakKeyDictionary[Context, int] = weakref.WeakKeyDictionary()
        self._freed: deque[int] = deque()

    # the first rank

    def tell(
        self,
        arrived: list[Generation | SideTask],
        cancelled: list[Generation | SideTask],
        forgotten: list[str],
    ) -> list[Generation | SideTask]:
        """Tell the others what has come, and note which requests are late or cancelled.

        Returns:
            The requests that have arrived and could be told; the others have failed.
        """
        now = time.monotonic()
        tensors: _Tensors = {}
        taken, new = [], []
        for wanted in arrived:
            number = self._take(wanted)
            try:
                new.append(self._written(number, wanted, tensors))
                taken.append(wanted)
            except Exception as error:  # of this request alone
                wanted.sink(FailureEvent(error))
        ended = {self._numbers[id(one)]: one for one in cancelled if id(one) in self._numbers}
        late = {number: self._known[number] for number, deadline in self._late.items() if now > deadline}
        for number in sorted(late.keys() - ended.keys()):
            late[number].sink(FailureEvent(TimeoutError()))
        ended |= late
        freed = [self._freed.popleft() for _ in range(len(self._freed))]
        self._send({"new": new, "cancelled": sorted(ended), "forgotten": forgotten, "freed": freed}, tensors)
        for number, one in ended.items():
            one.cancelled = True
            self._end(number)
        return taken

    def stop(self) -> None:
        """Tell the others that nothing comes any more."""
        self._send({"stop": True}, {})

    def _send(self, message: dict[str, Any], tensors: _Tensors) -> None:
        self._split.told(save({"": torch.zeros(1), **tensors}, {"message": json.dumps(message)}))

    def _take(self, wanted: Generation | SideTask) -> int:
        """Return the number that a request is given, whose end and deadline are watched here."""
        number = self._count
        self._count += 1
        self._known[number], self._numbers[id(wanted)] = wanted, number
        self._late[number], wanted.deadline = wanted.deadline, float("inf")
        sink = wanted.sink

        def watched(event: Any) -> None:
            sink(event)
            if isinstance(event, (FinishEvent, FailureEvent)):
                self._end(number)

        wanted.sink = watched
        return number

    def _end(self, number: int) -> None:
        wanted = self._known.pop(number, None)
        self._late.pop(number, None)
        if wanted is not None:
            self._numbers.pop(id(wanted), None)

    def _written(self, number: int, wanted: Generation | SideTask, tensors: _Tensors) -> dict[str, Any]:
        """Return a request as data for JSON, and put its tensors under names of their own."""
        if isinstance(wanted, SideTask):
            order, files = wanted.order or ({}, [])
            for i, one in enumerate(files):
                tensors[f"{number}.file.{i}"] = torch.frombuffer(bytearray(one), dtype=torch.uint8)
            return {"number": number, "order": order, "files": len(files)}
        spec = wanted.spec
        return {
            "number": number,
            "stop_ids": sorted(wanted.stop_ids),
            "max_tokens": wanted.max_tokens,
            "sampling": [wanted.sampling.temperature, wanted.sampling.top_p, wanted.sampling.seed],
            "key": wanted.key,
            "context": None if wanted.context is None else self._named[wanted.context],
            "ids": wanted.ids,
            "constrained": wanted.constraint is not None,
            "inputs": _inputs(wanted.inputs, f"{number}.inputs", tensors),
            "layout": _layout(wanted.layout),
            "spec": None
            if spec is None
            else {
                "inputs": _inputs(spec.inputs, f"{number}.spec", tensors),
                "layout": _layout(spec.layout),
                "prompt": spec.prompt,
                "keep": spec.keep,
                "score": spec.score,
                "max_tokens": spec.max_tokens,
                "whole": spec.whole,
                "budget": spec.budget,
            },
        }

    # every rank

    def keep(self, context: Context) -> None:
        """Note a context that was made, which all ranks make at the same step."""
        number = self._kept
        self._kept += 1
        if self.leads:
            self._named[context] = number
            weakref.finalize(context, self._freed.append, number)
        else:
            self._contexts[number] = context

    def chosen(self, choose: Callable[[], int]) -> int:
        """Return the next token of a row, which the first rank chooses.

        Raises:
            RuntimeError: It could not choose one; the first rank raises its own exception.
        """
        if not self.leads:
            (token,) = self._split.told_numbers([0])
            if token == _FAILED:
                raise RuntimeError("the first rank could not choose a token")
            return token
        token = _FAILED
        try:
            token = choose()
        finally:
            self._split.told_numbers([token])
        return token

    def likeliest(self, tokens: list[int]) -> list[int]:
        """Return the likeliest tokens as the first rank has found them."""
        return self._split.told_numbers(tokens)

    # the other ranks

    def hear(self) -> tuple[list[Generation | SideTask], list[str]] | None:
        """Wait for the next step, and return the requests that have come and the contexts to forget; None: the end."""
        raw = self._split.told()
        length = int.from_bytes(raw[:8], "little")
        message = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"]["message"])
        if message.get("stop"):
            return None
        tensors = {name: tensor.to(self._device) for name, tensor in load(raw).items()}
        new = [self._read(one, tensors) for one in message["new"]]
        for wanted, one in zip(new, message["new"], strict=True):
            self._known[one["number"]] = wanted
        for number in message["cancelled"]:
            if (known := self._known.pop(number, None)) is not None:
                known.cancelled = True
        for number in message["freed"]:
            self._contexts.pop(number, None)
        return new, message["forgotten"]

    def _read(self, one: dict[str, Any], tensors: _Tensors) -> Generation | SideTask:
        number = one["number"]

        def sink(event: Any) -> None:
            if isinstance(event, (FinishEvent, FailureEvent)):
                self._known.pop(number, None)

        if "order" in one:
            files = [tensors[f"{number}.file.{i}"].cpu().numpy().tobytes() for i in range(one["files"])]
            return SideTask(lambda: self._make_task(one["order"], files), sink)
        spec = one["spec"]
        return Generation(
            sink=sink,
            stop_ids=set(one["stop_ids"]),
            max_tokens=one["max_tokens"],
            sampling=Sampling(*one["sampling"]),
            key=one["key"],
            context=None if one["context"] is None else self._contexts[one["context"]],
            spec=None
            if spec is None
            else ContextSpec(
                _inputs_of(spec["inputs"], f"{number}.spec", tensors),
                _layout_of(spec["layout"]),  # type: ignore[arg-type]
                spec["prompt"],
                spec["keep"],
                spec["score"],
                spec["max_tokens"],
                spec["whole"],
                spec["budget"],
            ),
            ids=one["ids"],
            constraint=_Elsewhere() if one["constrained"] else None,
            inputs=_inputs_of(one["inputs"], f"{number}.inputs", tensors),
            layout=_layout_of(one["layout"]),
        )


class _Elsewhere:
    """Stands for a constraint that the first rank has, which chooses the tokens."""

    def masked(self, logits: Tensor) -> Tensor:
        raise AssertionError("tokens under a constraint are chosen by the first rank")

    def take(self, token: int) -> None:
        raise AssertionError("tokens under a constraint are chosen by the first rank")


def _inputs(inputs: Any, prefix: str, tensors: _Tensors) -> dict[str, Any] | None:
    """Return which inputs of a model there are, and put their tensors under names that begin with a prefix.

    Raises:
        InputError: An input is neither a tensor nor data for JSON.
    """
    if inputs is None:
        return None
    plain: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}.{name}"] = value.cpu().clone().contiguous()  # two inputs may share their memory
            continue
        try:
            plain[name] = json.loads(json.dumps(value))
        except TypeError:
            raise InputError(
                f"this model takes an input {name!r} of the class {type(value).__name__}, which is not passed between"
                " processes: serve it without --tp"
            ) from None
    return {"plain": plain, "tensors": [name for name, value in inputs.items() if isinstance(value, Tensor)]}


def _inputs_of(written: dict[str, Any] | None, prefix: str, tensors: _Tensors) -> dict[str, Any] | None:
    if written is None:
        return None
    return {name: tensors[f"{prefix}.{name}"] for name in written["tensors"]} | written["plain"]


def _layout(layout: TokenLayout | None) -> list[Any] | None:
    if layout is None:
        return None
    places = layout.separators.tolist(), layout.timestamps.tolist()
    return [layout.length, layout.prompt_length, plain_images(layout.images), *places]


def _layout_of(written: list[Any] | None) -> TokenLayout | None:
    if written is None:
        return None
    length, prompt_length, images, *places = written
    separators, timestamps = (torch.tensor(one, dtype=torch.long) for one in places)
    return TokenLayout(length, prompt_length, images_of(images), separators, timestamps)
