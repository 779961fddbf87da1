"""Times of contenders in turn, and what follows from them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

CLEARLY = 1.04  # a path replaces the usual one only if that takes so many times as long: clocks are noisy
_HOPELESS = 2.0  # a contender whose first runs take so many times as long as the best one's is not run again
_LEAST, _MOST = 3, 40  # rounds

Run = Callable[[], object]


def in_turn(
    runs: Mapping[str, Run], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Run contenders in turn until a time is over, and return the least seconds of each.

    Others that use the processor make a run slower, never faster, so the least is the best estimate.
    """
    stop = clock() + seconds
    best = dict.fromkeys(runs, float("inf"))
    left = list(runs)
    for number in range(_MOST):
        if number >= _LEAST:
            left = [name for name in left if best[name] <= _HOPELESS * min(best.values())]
            if clock() > stop or len(left) < 2:
                break
        for name in left:
            best[name] = min(best[name], _took(runs[name], clock))
    return best


def _took(run: Run, clock: Callable[[], float]) -> float:
    began = clock()
    run()
    return clock() - began


def fastest(seconds: Mapping[str, float], usual: str) -> str:
    """Return the fastest path, or the usual one unless another is clearly faster."""
    best = min(seconds, key=seconds.__getitem__)
    return usual if usual in seconds and seconds[usual] <= CLEARLY * seconds[best] else best


def each_in_turn(ours: Mapping[int, Run], theirs: Mapping[int, Run], seconds: float) -> dict[int, tuple[float, float]]:
    """Return the least seconds of two contenders for each number of rows."""
    stop, found = time.perf_counter() + seconds, {}
    for left, rows in zip(range(len(ours), 0, -1), ours, strict=True):
        share = (stop - time.perf_counter()) / left
        took = in_turn({"ours": ours[rows], "theirs": theirs[rows]}, share)
        found[rows] = took["ours"], took["theirs"]
    return found


def rows_served(seconds: Mapping[int, tuple[float, float]], usual: tuple[int, int]) -> tuple[int, int]:
    """Return from how many rows to how many a kernel serves.

    It is the longest run of measured numbers of rows for which the kernel is not slower. Between two measured numbers
    the smaller one decides.

    Args:
        seconds: Number of rows -> seconds of the kernel and of the contender.
        usual: What is known of such processors, which decides where the two are within the clock's noise.
    """
    best = run = (1, 0)
    counts = sorted(seconds)
    for i, count in enumerate(counts):
        ours, theirs = seconds[count]
        inside = usual[0] <= count <= usual[1]
        if ours <= (theirs * CLEARLY if inside else theirs / CLEARLY):
            stop = counts[i + 1] - 1 if i + 1 < len(counts) else count
            run = (run[0] if run[1] else count, stop)
            best = max(best, run, key=lambda one: one[1] - one[0] if one[1] else -1)
        else:
            run = (1, 0)
    return best
