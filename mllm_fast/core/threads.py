"""How long the threads of the OpenMP runtime spin while they wait, in processes that this package itself starts."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping

# rounds of GNU's runtime, which torch's wheels bring: some 10 microseconds in place of milliseconds. Threads that spin
# keep a neighbour's process, or another of our own threads, from the processor that it waits for
_SPIN = {"GOMP_SPINCOUNT": "2000"}
_TOLD = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")  # by which users say it themselves


def spin_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what a process's environment needs so that waiting threads soon yield, unless it says so itself."""
    return {} if any(name in environment for name in _TOLD) else dict(_SPIN)


def spin_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let the waiting threads of this process soon yield. To be called before torch is loaded."""
    environment.update(spin_settings(environment))
