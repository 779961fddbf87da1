"""Programs that run in several processes, which torch.distributed joins, as torchrun starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def start(ranks: int, arguments: Sequence[Any], **environment: str) -> list[subprocess.Popen[str]]:
    """Start a program of Python, given by its arguments, once a rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
        **environment,
    }
    command = [sys.executable, *map(str, arguments)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(command, env={**given, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **pipes)
        for rank in range(ranks)
    ]


def finished(processes: Sequence[subprocess.Popen[str]], seconds: float = 300) -> list[str]:
    """Return what each process printed, once all have ended well."""
    try:
        found = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, found, strict=True):
        assert process.returncode == 0, errors[-4000:]
    return [output for output, _ in found]
