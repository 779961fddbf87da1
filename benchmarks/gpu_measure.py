"""What the sections of gpu.py share: contenders and their first run, the gate, times by CUDA events, device facts."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from harness import median
from torch._inductor.utils import fresh_cache

OURS = "ours"
WARM_UP = 5
# of 256 MiB a run: they empty the second cache, and last longer than the host takes to enqueue what is timed
FLUSH_BYTES, FLUSHES = 256 << 20, 8


class Contender(NamedTuple):
    """name; make() does what is not timed (a block mask, a captured graph) and gives what is; computes: the mask under
    which its error and its useful work count."""

    name: str
    make: Callable[[], Callable[[], object]]
    computes: str
    cuda_only: bool = False
    compiles: bool = False  # by Inductor, which has no result of an earlier compilation then


class Trial(NamedTuple):
    """A contender that ran: what it gave; seconds of `make` and of its first run, compilation included."""

    contender: Contender
    output: object
    prepare_s: float
    first_call_s: float


@dataclass
class Bench:
    """Where and how long to measure. A rehearsal runs everything once on the CPU and holds no times."""

    rehearsal: bool
    quick: bool
    rounds: int
    folder: str  # for what is compiled

    def __post_init__(self):
        self.device = torch.device("cpu" if self.rehearsal else "cuda")
        self.backend = "torch" if self.rehearsal else "triton"
        self.dtype = torch.bfloat16
        self.left_out: dict[tuple[str, str], list[str]] = {}  # contender, reason -> cases
        self.rates: dict[str, float] = {}
        self._flush = None if self.rehearsal else torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.device)

    def draw(self, seed: int) -> Callable[..., torch.Tensor]:
        """Normal numbers of the given shape, the same in every run on one kind of device."""
        gen = torch.Generator(self.device).manual_seed(seed)
        return lambda *shape: torch.randn(*shape, generator=gen, device=self.device, dtype=self.dtype)

    def synchronize(self) -> None:
        if not self.rehearsal:
            torch.cuda.synchronize()

    def first_runs(self, case: str, contenders: Iterable[Contender]) -> dict[str, Trial]:
        """Each contender once. One that cannot run is named with the reason; only ours may not fail."""
        found = {}
        for contender in contenders:
            if contender.cuda_only and self.rehearsal:
                self.leave_out(case, contender.name, "it needs CUDA")
                continue
            reason = ""
            with warnings.catch_warnings(record=True) as caught:  # torch warns why it refuses an attention backend
                warnings.simplefilter("always")
                try:
                    found[contender.name] = self._first_run(contender)
                except Exception as error:
                    if contender.name == OURS:
                        raise
                    lines = [str(error), *(str(one.message) for one in caught)]
                    reason = f"{type(error).__name__}: " + "; ".join(line.strip().split("\n")[0] for line in lines)
            if reason:
                self.leave_out(case, contender.name, reason[:500])
        return found

    def _first_run(self, contender: Contender) -> Trial:
        with fresh_cache(delete=False, dir=self.folder) if contender.compiles else nullcontext():
            start = time.perf_counter()
            run = contender.make()
            self.synchronize()
            made = time.perf_counter()
            output = run()
            self.synchronize()
            return Trial(contender, output, made - start, time.perf_counter() - made)

    def leave_out(self, case: str, name: str, reason: str) -> None:
        """Says so; the same reason once."""
        if (name, reason) not in self.left_out:
            print(f"{name}: left out, first of {case}: {reason}", flush=True)
        self.left_out.setdefault((name, reason), []).append(case)
        if not self.rehearsal:
            torch.cuda.empty_cache()  # the reason may have been a lack of memory

    def missing(self, case: str) -> str:
        """Who is left out of a case, a line for its table; "" if nobody."""
        names = [name for (name, _), cases in self.left_out.items() if case in cases]
        return f"  left out, see above: {'; '.join(names)}\n" if names else ""

    def times(self, runs: dict[str, Callable[[], object]], queued: bool = True) -> dict[str, float]:
        """Median milliseconds of each by CUDA events, in turn, the second cache flushed before each; none in a
        rehearsal. queued: launched while the flush runs, so that the host's time does not show; else the device is
        idle at the start and the host's time counts."""
        if self.rehearsal:
            for run in runs.values():
                run()
            return {}
        found: dict[str, list[float]] = {name: [] for name in runs}
        for i in range(WARM_UP + self.rounds):
            for name, run in runs.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                for _ in range(FLUSHES):
                    self._flush.zero_()
                if not queued:
                    torch.cuda.synchronize()
                start.record()
                run()
                end.record()
                end.synchronize()
                if i >= WARM_UP:
                    found[name].append(start.elapsed_time(end))
        return {name: median(values) for name, values in found.items()}


def gate(case: str, errors: dict[str, float], reference: float, rounding: float) -> float:
    """What an error may be: twice the reference's own and one rounding. Ends the run where one exceeds it."""
    allowed = 2 * reference + rounding
    for name, error in errors.items():
        if not error <= allowed:
            raise SystemExit(
                f"{case}: {name}: error {error:.1e}, allowed {allowed:.1e}: no figures for a wrong contender"
            )
    return allowed


def bf16_rounding(largest: float) -> float:
    return largest * torch.finfo(torch.bfloat16).eps / 2


def graphed(contender: Contender) -> Contender:
    """The same as a CUDA graph, captured by `make`."""

    def make() -> Callable[[], object]:
        run = contender.make()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and sets up libraries, which a capture may not
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = run()

        def replay() -> object:
            graph.replay()
            return output

        return replay

    return Contender(f"{contender.name}, graph", make, contender.computes, cuda_only=True)


def device_facts() -> dict[str, object]:
    """What a reader needs to compare figures."""
    import triton

    chip = torch.cuda.get_device_properties(0)
    return {
        "name": chip.name,
        "capability": f"{chip.major}.{chip.minor}",
        "multiprocessors": chip.multi_processor_count,
        "memory_gb": chip.total_memory / 1e9,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "float32_products": torch.get_float32_matmul_precision(),
    }


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def rates(bench: Bench) -> dict[str, float]:
    """The device's measured ceilings: products of matrices in TFLOP/s, a copy in GB/s (read and written)."""
    size, copied = (64, 1 << 10) if bench.rehearsal else (8192, 1 << 30)
    operands = {dtype: bench.draw(1)(size, size).to(dtype) for dtype in (torch.bfloat16, torch.float32)}
    out = {dtype: torch.empty_like(one) for dtype, one in operands.items()}
    source = torch.ones(copied, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)

    def product(dtype: torch.dtype) -> Callable[[], object]:
        return lambda: torch.matmul(operands[dtype], operands[dtype], out=out[dtype])

    ms = bench.times(
        {
            "bf16_tflops": product(torch.bfloat16),
            "float32_tflops": product(torch.float32),
            "copy_gb_per_s": lambda: target.copy_(source),
        }
    )
    work = {"bf16_tflops": 2 * size**3 / 1e9, "float32_tflops": 2 * size**3 / 1e9, "copy_gb_per_s": 2 * copied / 1e6}
    return {name: work[name] / time for name, time in ms.items()}
