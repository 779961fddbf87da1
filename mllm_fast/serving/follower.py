"""The other processes of a Ray Serve replica whose model is divided: they are started and watched by the replica.

    python -m mllm_fast.serving.follower < OPTIONS

OPTIONS are the arguments of the application as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from ..core.ranks import follow_parent, of_rank, variables
from .ray_options import Options
from .service import follow


def start_followers(count: int, options: dict[str, Any]) -> list[subprocess.Popen[bytes]]:
    """Start the other processes of a model, and make this one their first rank.

    The replica ends with the first of them that ends.

    Args:
        count: The number of processes, this one included.
        options: The arguments of the application.
    """
    shared = variables(count)
    os.environ.update(of_rank(shared, 0))
    started = []
    for rank in range(1, count):
        command = [sys.executable, "-m", __name__]
        environment = {**os.environ, **of_rank(shared, rank)}
        process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
        with process.stdin as pipe:  # type: ignore[union-attr]
            pipe.write(json.dumps(options, default=str).encode())
        started.append(process)
    return started


def end_with(followers: Sequence[subprocess.Popen[bytes]]) -> None:
    """End this process at once when one of its followers ends, so that its requests are sent to another replica."""
    for process in followers:
        threading.Thread(target=_end_with, args=(process,), name="follower", daemon=True).start()


def _end_with(process: subprocess.Popen[bytes]) -> None:
    process.wait()
    os._exit(1)


def main() -> None:
    """Run the engine as the replica tells it."""
    follow_parent()
    options = Options(**json.loads(sys.stdin.buffer.read()))
    follow(options.load(), options.settings)


if __name__ == "__main__":
    main()
