"""Which path computes a call on this processor: an instruction set of the compiled kernels, or torch.

The choices come from a calibration on the machine at hand (`kernels.tuning`), which is kept in the user's cache by
processor, number of threads, version of torch and build of the kernels. Where there is none, a table for known
processors serves. `MLLM_FAST_TUNING=off` makes the table serve everywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .extension import cpu_extension

# the uses of the kernels that are measured one by one: op, what kind of call, dtype
USES = (
    "knockout_attention/prefill/float32",
    "knockout_attention/prefill/bfloat16",
    "knockout_attention/few rows/float32",
    "knockout_attention/few rows/bfloat16",
    "knockout_attention/one row/float32",
    "knockout_attention/one row/bfloat16",
    "logprob_increase/all/float32",
    "logprob_increase/all/bfloat16",
    "skinny_linear/all/float32",
    "skinny_linear/all/bfloat16",
    "weighted_values/all/float32",
    "weighted_values/all/bfloat16",
    "token_scores/all/float32",
    "decoder_layers/all/float32",
    "decoder_layers/all/bfloat16",
)
_held: Paths | None = None
FEW = 32  # rows of attention up to which a call is one of few rows
_SETTING = "MLLM_FAST_TUNING"


@dataclass(frozen=True)
class Paths:
    """The choices for one processor.

    Attributes:
        path: Use -> instruction set, or "torch" where torch was faster.
        rows: Dtype -> the least and the most rows that `skinny_linear` computes with its kernel; (1, 0) for none.
        source: "measured" or "table".
        seconds: Use -> path -> seconds of the calibration; for `skinny_linear` the paths are named with their rows.
    """

    path: dict[str, str]
    rows: dict[str, tuple[int, int]]
    source: str
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)


@cache
def processor() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def table(sets: list[str], name: str) -> Paths:
    """Return the choices for a processor that was not measured.

    Args:
        sets: Its instruction sets, best first.
        name: Its name, which tells the maker.
    """
    path = dict.fromkeys(USES, sets[0])
    intel = "intel" in name.lower()
    if intel and sets[0] == "avx512_bf16":  # there its pairs take 1.7 times as long as widened multiply-adds
        path["knockout_attention/prefill/bfloat16"] = path["knockout_attention/few rows/bfloat16"] = "avx512"
    # MKL reads a weight for one or two rows faster than the kernel on the Xeons that were measured
    return Paths(path, {"float32": (3, 64) if intel else (1, 64), "bfloat16": (1, 8)}, "table")


@cache
def paths() -> Paths:
    """Return the choices for this processor: what was measured before, else the table. Read once a process."""
    if _held is not None:
        return _held
    extension, _ = cpu_extension()
    sets = extension.instruction_sets() if extension else ["torch"]
    return read_measured() or table(sets, processor())


def path_of(op: str, dtype: torch.dtype, kind: str = "all") -> str:
    """Return the instruction set that computes an op for operands of a dtype, or "torch"."""
    return _path_of(op, dtype, kind)


@cache
def _path_of(op: str, dtype: torch.dtype, kind: str) -> str:
    return paths().path[f"{op}/{kind}/{str(dtype).removeprefix('torch.')}"]


def instruction_set(op: str, dtype: torch.dtype, kind: str = "all") -> str:
    """Return the instruction set that computes an op with its compiled kernel.

    Raises:
        RuntimeError: The compiled extension is missing.
    """
    chosen = path_of(op, dtype, kind)
    if chosen != "torch":
        return chosen
    extension, reason = cpu_extension()
    if extension is None:
        raise RuntimeError(reason)
    return extension.instruction_sets()[0]


def hold(found: Paths | None) -> None:
    """Let these choices serve in this process, where the cache does not keep them; None for those of the cache."""
    global _held
    _held = found


def forget() -> None:
    """Let the next call read the choices anew."""
    paths.cache_clear()
    _path_of.cache_clear()


def wanted() -> bool:
    """Return whether choices may come from a calibration: the kernels are built, and the user did not say no."""
    return cpu_extension()[0] is not None and os.environ.get(_SETTING, "on").lower() not in ("off", "0", "no", "false")


def cache_file() -> Path:
    """Return the file that keeps the calibration for this processor, number of threads, torch and build."""
    extension, _ = cpu_extension()
    built = Path(extension.__file__).stat() if extension is not None and extension.__file__ else None
    key = (processor(), torch.get_num_threads(), torch.__version__, built and (built.st_size, built.st_mtime_ns))
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "mllm-fast" / f"tuning-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.json"


def writable(folder: Path) -> bool:
    """Return whether a file can be made in a folder."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def read_measured() -> Paths | None:
    """Return the calibration that the cache keeps, or None if there is none that this build can use."""
    if not wanted():
        return None
    try:
        found: Any = json.loads(cache_file().read_text())
        extension, _ = cpu_extension()
        known = {*extension.instruction_sets(), "torch"}  # type: ignore[union-attr]
        path = {use: str(found["path"][use]) for use in USES}
        rows = {name: (int(found["rows"][name][0]), int(found["rows"][name][1])) for name in ("float32", "bfloat16")}
        seconds = {
            str(use): {str(one): float(took) for one, took in each.items()} for use, each in found["seconds"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None
    return Paths(path, rows, "measured", seconds) if set(path.values()) <= known else None


def write_measured(found: Paths, replace: bool) -> Path | None:
    """Keep a calibration, whole or not at all.

    Args:
        found: The calibration.
        replace: Whether it replaces one that is there. Of several processes that measure a machine at once, the first
            one's result serves all.

    Returns:
        Its file, or None where no cache can be written.
    """
    content = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "path": found.path,
        "rows": found.rows,
        "seconds": found.seconds,
    }
    part = None
    try:
        target = cache_file()
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=target.parent, suffix=".part", delete=False) as file:
            part = Path(file.name)
            json.dump(content, file, indent=1)
        if replace or read_measured() is None:
            part.replace(target)
    except OSError:
        return None
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
    return target
