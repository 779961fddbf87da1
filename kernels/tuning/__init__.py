"""Calibration: which path is the fastest for each use of the kernels on the machine at hand.

Every path that the processor has, and torch where it computes the same, runs each use in turn on small operands. The
fastest is chosen. The result is kept in the user's cache (`kernels.paths`), so a machine is measured once.
"""

from __future__ import annotations

import threading
import time

from .. import dispatch, paths
from ..extension import cpu_extension
from . import timing, uses

__all__ = ["ready", "tune"]

SECONDS = 2.0  # that a calibration may take
_guard = threading.Lock()


def ready() -> None:
    """Calibrate this machine unless that was done before; it takes two seconds at most.

    Nothing is measured where the kernels are not built, where the result could not be kept, or where the environment
    has `MLLM_FAST_TUNING=off`. There the table of known processors serves.
    """
    with _guard:
        if paths.paths().source == "table" and paths.wanted() and _can_keep():
            _tune(SECONDS, replace=False)


def tune(seconds: float = SECONDS) -> paths.Paths:
    """Calibrate this machine, keep the result in the user's cache, and use it from now on.

    Args:
        seconds: How long it may take.

    Returns:
        The choices. They serve in this process even if the cache cannot be written.

    Raises:
        RuntimeError: The compiled extension is missing, so that there is nothing to choose from.
    """
    if cpu_extension()[0] is None:
        raise RuntimeError(cpu_extension()[1])
    with _guard:
        return _tune(seconds, replace=True)


def _tune(seconds: float, replace: bool) -> paths.Paths:
    extension, _ = cpu_extension()
    sets = extension.instruction_sets()  # type: ignore[union-attr]
    usual = paths.table(sets, paths.processor())
    path, measured = dict(usual.path), {}
    stop = time.perf_counter() + 0.9 * seconds  # a run that began may end after it
    todo = uses.all_uses(sets)
    for left, use in zip(range(len(todo), 0, -1), todo, strict=True):
        share = (stop - time.perf_counter()) / (left + uses.ROW_SHARES)
        measured[use.name] = timing.in_turn(use.prepare(), share)
        path[use.name] = timing.fastest(measured[use.name], usual.path[use.name])
    rows = {}
    for left, dtype in ((2, "float32"), (1, "bfloat16")):
        use_name = f"skinny_linear/all/{dtype}"
        kernel, torchs = uses.linear_rows(dtype, path[use_name])
        times = timing.each_in_turn(kernel, torchs, (stop - time.perf_counter()) / left)
        rows[dtype] = timing.rows_served(times, usual.rows[dtype])
        for count, (ours, theirs) in times.items():
            measured[use_name] |= {f"{count} rows": ours, f"{count} rows, torch": theirs}
    found = paths.Paths(path, rows, "measured", measured)
    kept = paths.write_measured(found, replace)
    paths.hold(found if kept is None else None)
    dispatch.forget()
    return paths.paths()


def _can_keep() -> bool:
    """Return whether the cache's folder can be written."""
    try:
        folder = paths.cache_file().parent
        folder.mkdir(parents=True, exist_ok=True)
        return paths.writable(folder)
    except OSError:
        return False
