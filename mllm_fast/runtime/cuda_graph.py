"""A function over tensors that stay where they are, captured as a CUDA graph where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
_WARM_UP = 2  # calls before the capture, in which kernels are compiled and tuned


class Replayed(Generic[Result]):
    """Calls a function, or on a GPU replays what its first call did.

    Args:
        function: Reads and writes tensors that stay, and returns tensors; a replay writes the same ones again.
        moving: Tensors that the function moves on, of which the calls before the capture must leave no trace.
        attached: Returns a block in which the function is called; a replay needs none.
    """

    def __init__(
        self,
        function: Callable[[], Result],
        moving: Sequence[Tensor],
        attached: Callable[[], AbstractContextManager],
    ):
        self._function, self._moving, self._attached = function, moving, attached
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Result

    def __call__(self) -> Result:
        device = self._moving[0].device
        if device.type != "cuda":
            with self._attached():
                return self._function()
        with torch.cuda.device(device):
            if self._graph is None:
                self._capture(device)
            self._graph.replay()  # type: ignore[union-attr]
        return self._result

    def _capture(self, device: torch.device) -> None:
        before, state = [one.clone() for one in self._moving], torch.cuda.get_rng_state(device)
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        graph = torch.cuda.CUDAGraph()
        with self._attached():
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    self._function()
            torch.cuda.current_stream(device).wait_stream(side)
            for one, value in zip(self._moving, before, strict=True):
                one.copy_(value)
            torch.cuda.set_rng_state(state, device)
            with torch.cuda.graph(graph):
                self._result = self._function()
        self._graph = graph
