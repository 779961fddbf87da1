"""What the benchmarks share: the machine's name, medians of contenders in turn, the result file."""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path


def machine() -> dict[str, str | int]:
    """What a reader needs to compare figures: processor, instruction set, threads, versions."""
    import torch
    from mllm_fast.kernels.extension import cpu_extension
    from mllm_fast.kernels.paths import processor

    extension, _ = cpu_extension()
    return {
        "cpu": processor(),
        "instruction sets": ", ".join(extension.instruction_sets()) if extension else "extension not built",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def in_turn(contenders: dict[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each contender, one run each a round, so that a machine whose speed drifts drifts for all."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(warm_up + rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if i >= warm_up:
                times[name].append(time.perf_counter() - start)
    return times


def median(values: list[float]) -> float:
    return statistics.median(values)


def write_result(path: Path | None, result: dict) -> None:
    """Whole or not at all."""
    if path is not None:
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(result, indent=1) + "\n")
        part.replace(path)


def peak_bytes(run: Callable[[], object]) -> int:
    """How much the resident memory of this process grows at most while `run` runs (Linux).

    A run that is not counted comes first, for what stays allocated between calls; then the allocator gives back
    what it holds free, which would hide what the counted run takes.
    """
    run()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    status = Path("/proc/self/status")

    def read(field: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    before = read("VmRSS")
    run()
    return max(0, read("VmHWM") - before)
