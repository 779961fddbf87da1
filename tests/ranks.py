"""Programs that run in several processes, which torch.distributed joins, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mllm_fast.core.ranks import of_rank, variables

HERE = Path(__file__).parent


def environment() -> dict[str, str]:
    """The environment of the programs: one thread, no GPU, and the tests' own modules."""
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


@contextmanager
def running(ranks: int, arguments: Sequence[Any], before: Sequence[str] = ()) -> Iterator[list[subprocess.Popen[str]]]:
    """Run a program of Python, given by its arguments, once a rank; the processes are ended with the block.

    `before` is a command that runs another one.
    """
    shared = variables(ranks) | environment()
    command = [*before, sys.executable, *map(str, arguments)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with ExitStack() as stack:
        found = []
        for rank in range(ranks):
            found.append(stack.enter_context(subprocess.Popen(command, env=of_rank(shared, rank), **pipes)))
            stack.callback(found[-1].kill)
        yield found


def finished(processes: Sequence[subprocess.Popen[str]], seconds: float = 300) -> list[str]:
    """Return what each process printed, once all have ended well."""
    found = [process.communicate(timeout=seconds) for process in processes]
    for process, (_, errors) in zip(processes, found, strict=True):
        assert process.returncode == 0, errors[-4000:]
    return [output for output, _ in found]
