"""Waiting for what must happen, however busy the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable

HANG = 600.0  # seconds after which a test gives up; nothing takes so long but what hangs


def until(happened: Callable[[], object]) -> None:
    """Return when `happened()` is true.

    Raises:
        TimeoutError: it hangs.
    """
    deadline = time.monotonic() + HANG
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"it did not happen within {HANG:g} s")
        time.sleep(0.02)
