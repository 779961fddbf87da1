"""The processes that a model is divided between: what each is told by its environment, as torchrun does."""

from __future__ import annotations

import os
import socket
import threading
import time

_PARENT = "MLLM_FAST_PARENT"  # the id of the process that started this one


def variables(count: int) -> dict[str, str]:
    """Return the environment variables that processes on this machine have in common.

    Args:
        count: The number of processes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or count
    return {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // count))),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        _PARENT: str(os.getpid()),
    }


def of_rank(shared: dict[str, str], rank: int) -> dict[str, str]:
    """Return the environment variables of one process."""
    return {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}


def follow_parent() -> None:
    """End this process when the one that started it as a rank has ended; other processes go on."""
    parent = os.environ.get(_PARENT)
    if parent is None or int(parent) == os.getpid():
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
