"""`--tp N`: the same command in N processes, of which the first one speaks.

The processes run the command as torchrun would start it, each on a GPU of its own or with a share of the cores. When
one ends, the others are ended too, so that none waits for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO, Any, NoReturn

from ..core.errors import InputError
from ..core.ranks import follow_parent, of_rank, variables

_LOOK = 0.1  # seconds between two looks at the processes
_LAST = 5.0  # seconds that the others have to end by themselves


def divided(tp: int | None, device: str | None = None) -> bool:
    """Return whether this process is one of those that a model is divided between; start them if they are not there.

    Args:
        tp: The number of processes, or None.
        device: The device that was asked for; "cpu" hides the GPUs, on which transformers divides models else.

    Raises:
        InputError: The number is below 1.
    """
    if tp is None or tp == 1:
        return False
    if tp < 1:
        raise InputError(f"--tp is at least 1, got {tp}")
    if "RANK" not in os.environ:
        _start(tp, device)
    follow_parent()
    return True


def _start(count: int, device: str | None) -> NoReturn:
    """Run this command in several processes, and end as they do."""
    shared = variables(count) | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    processes: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(count - 1)]
        for rank in range(count):
            # the others say what the first one does; what they say of an error is kept
            quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
            silent = quiet | {"stderr": said[rank - 1]} if rank else {}
            command = [sys.executable, "-m", "mllm_fast", *sys.argv[1:]]
            processes.append(subprocess.Popen(command, env={**os.environ, **of_rank(shared, rank)}, **silent))
        before = signal.signal(signal.SIGTERM, lambda *_: processes[0].terminate())  # which ends the others
        stack.callback(signal.signal, signal.SIGTERM, before)
        code = _wait(processes, said)
    sys.exit(code)


def _wait(processes: Sequence[subprocess.Popen[bytes]], said: Sequence[IO[bytes]]) -> int:
    """Wait until all processes have ended, or one with an error, and return the exit code of the command."""
    bad, interrupted = None, 0
    while bad is None and interrupted < 2:
        try:
            codes = [process.poll() for process in processes]
            bad = next((rank for rank, code in enumerate(codes) if code), None)
            if codes[0] == 0:  # it has said all there is to say
                _end(processes)
                return 0
            time.sleep(_LOOK)
        except KeyboardInterrupt:  # which all processes got, too: the first one ends in its own time
            interrupted += 1
    bad = bad or 0
    _end(processes)
    code = processes[bad].returncode
    if bad and processes[0].returncode != code:  # else the first one has said it
        said[bad - 1].seek(0)
        lines = said[bad - 1].read().decode(errors="replace").strip().splitlines()
        how = f"by the signal {-code}" if code < 0 else f"with code {code}"
        why = f": {lines[-1]}" if lines else ""
        print(f"mllm-fast: process {bad} of {len(processes)} ended {how}{why}", file=sys.stderr)
    return code if code > 0 else 1


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End processes, by force where they do not end by themselves."""
    until = time.monotonic() + _LAST
    while time.monotonic() < until and any(process.poll() is None for process in processes):
        time.sleep(_LOOK)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
