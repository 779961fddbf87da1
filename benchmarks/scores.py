"""How fast are position scores? `python benchmarks/scores.py`: one layer of LLaVA-1.5-7B's sizes, float32.

Contenders, each scoring all positions of a head of the layer:
- direct: project, norm, unembed, log-softmax in torch, as the notebook of arXiv 2411.10950 does;
- torch, cached: the factored way in plain torch, the operator at hand;
- kernel, cached: the factored way on the compiled kernel;
- kernel, on the fly: the same, the operator made in the call.
The op needs the logits at the residual vector too, a pass over the whole unembedding. The heads of a layer share
them: the kernel's rows score all 32 heads (on the fly: 8) in one call, a head's time is that over the heads.
"One head alone" pays that pass for a single head.

A gate against float64 comes first: no figure is printed for a wrong contender. Then all contenders run in
turn; figures are medians. Last: arithmetic rates beside torch's own sgemm and a register-only loop of
multiply-adds, peak memory beyond the operator, and one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from harness import in_turn, machine, median, peak_bytes, write_result
from mllm_fast.kernels import Base, OperatorCache, Unembedding, logprob_increase
from mllm_fast.kernels.extension import cpu_extension
from mllm_fast.kernels.logprob_increase import cpu_kernel
from mllm_fast.kernels.logprob_increase.reference import logprob_increase as reference
from mllm_fast.kernels.paths import instruction_set

VOCAB, WIDTH, HEADS, DEPTH, POSITIONS = 32_064, 4096, 32, 128, 600


class Layer:
    """Random weights of one layer and one explained row, the same in every run."""

    def __init__(self, heads: int):
        gen = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=gen)  # noqa: E731
        self.heads = heads
        self.unembedding = Unembedding(
            weight=draw(VOCAB, WIDTH) / WIDTH**0.5, gain=torch.rand(WIDTH, generator=gen) + 0.5
        )
        self.projection = draw(heads, WIDTH, DEPTH) / (HEADS * DEPTH) ** 0.5
        self.values = draw(heads, POSITIONS, DEPTH) * torch.rand(heads, POSITIONS, 1, generator=gen) ** 8
        self.residual, self.final = draw(1, WIDTH), 2 * draw(1, WIDTH)
        self.token = torch.tensor([123])

    def call(self, heads: slice, **options) -> torch.Tensor:
        """Our op on some heads of the layer, which share one residual vector."""
        values = self.values[heads]
        return logprob_increase(
            self.residual,
            values,
            self.token,
            self.unembedding,
            projection=self.projection[heads],
            final=self.final,
            source=torch.zeros(len(values), dtype=torch.long),
            **options,
        )

    def direct(self, head: int) -> torch.Tensor:
        """The notebook's way, for one head."""
        u = self.unembedding
        scale = torch.rsqrt(self.final.square().mean() + u.eps)
        x = self.residual + self.values[head] @ self.projection[head].T
        after = torch.log_softmax((x * scale * u.gain) @ u.weight.T, -1)[:, self.token]
        before = torch.log_softmax((self.residual * scale * u.gain) @ u.weight.T, -1)[:, self.token]
        return (after - before)[:, 0]


def contenders(layer: Layer) -> dict[str, Callable[[int], torch.Tensor]]:
    """Each way of scoring the positions of one head; the operator of the first head is cached."""
    cached = {"way": "factored", "operators": OperatorCache(1 << 34), "keys": [(0, 0)]}
    one = slice(0, 1)
    return {
        "direct": layer.direct,
        "torch, cached": lambda head: layer.call(one, backend="torch", **cached)[0],
        "kernel, cached": lambda head: layer.call(one, **cached)[0],
        "kernel, on the fly": lambda head: layer.call(one, way="factored")[0],
    }


def gate(layer: Layer, contenders: dict[str, Callable[[int], torch.Tensor]]) -> dict[str, float]:
    """Largest errors of one head's scores against float64; fails where one exceeds twice the direct way's own
    error and a rounding of the logits."""
    wide = Unembedding(layer.unembedding.weight.double(), layer.unembedding.gain.double())
    truth = reference(
        layer.residual.double(),
        layer.values[:1].double(),
        layer.token,
        wide,
        projection=layer.projection[:1].double(),
        final=layer.final.double(),
    )[0]
    errors = {name: float((run(0).double() - truth).abs().max()) for name, run in contenders.items()}
    allowed = 2 * errors["direct"] + 4 * torch.finfo(torch.float32).eps
    for name, error in errors.items():
        if not error <= allowed:
            raise SystemExit(f"{name}: error {error:.1e}, allowed {allowed:.1e}: no figures for a wrong contender")
    return errors


def rates(layer: Layer, rounds: int) -> dict[str, float]:
    """GFLOP/s: the kernel's multiply-adds, torch's sgemm, the register-only loop."""
    threads = torch.get_num_threads()
    extension, _ = cpu_extension()
    operator = torch.randn(VOCAB, DEPTH)
    base = Base(layer.residual, layer.token, layer.unembedding, final=layer.final)
    square = torch.randn(2048, 2048)

    def kernel(isa: str) -> None:
        cpu_kernel.increase(base, layer.values[:1], None, operator, None, None, isa)

    found = {}
    # each path beside its own ceiling: wide instructions lower the clock for those that follow
    for isa in extension.instruction_sets():
        seconds, peaks = [], []
        for _ in range(rounds):
            seconds += in_turn({"kernel": partial(kernel, isa)}, 1)["kernel"]
            peaks.append(extension.fma_rate(threads, isa) / 1e9)
        found[f"kernel, {isa}"] = 2 * VOCAB * DEPTH * POSITIONS / median(seconds) / 1e9
        found[f"peak, {isa}"] = median(peaks)
    found["sgemm"] = 2 * 2048**3 / median(in_turn({"sgemm": lambda: square @ square}, rounds)["sgemm"]) / 1e9
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--heads", type=int, default=HEADS, help="heads of the layer that are scored in one call")
    parser.add_argument("--out", type=Path, default=None, help="write the JSON line here too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    layer = Layer(args.heads)
    cache = OperatorCache(1 << 34)
    keys = [(0, j) for j in range(args.heads)]
    whole, one = slice(None), slice(0, 1)
    cached = {"way": "factored", "operators": cache}
    errors = gate(layer, contenders(layer))
    layer.call(whole, keys=keys, **cached)  # fills the cache
    runs = {
        "direct": (lambda: layer.direct(0), 1),
        "torch, cached": (lambda: layer.call(slice(0, 2), backend="torch", keys=keys[:2], **cached), 2),
        "kernel, cached": (lambda: layer.call(whole, keys=keys, **cached), args.heads),
        "kernel, on the fly": (lambda: layer.call(slice(0, 8), way="factored"), min(8, args.heads)),
        "kernel, cached, one head alone": (lambda: layer.call(one, keys=keys[:1], **cached), 1),
    }
    times = in_turn({name: run for name, (run, _) in runs.items()}, args.rounds)
    result: dict = {"benchmark": "scores", "machine": machine(), "rounds": args.rounds, "heads": args.heads, "ways": {}}
    direct = median(times["direct"])
    for name, (_, heads) in runs.items():
        seconds = median(times[name]) / heads
        error = errors[name.removesuffix(", one head alone")]
        row = {"ms_per_head": seconds * 1e3, "times_faster": direct / seconds, "error": error}
        result["ways"][name] = row
        print(f"{name:31s} {row['ms_per_head']:8.2f} ms a head  {row['times_faster']:6.1f}x  error {row['error']:.1e}")
    result["gflops"] = rates(layer, args.rounds)
    isa = instruction_set("logprob_increase", torch.float32)
    for name, rate in result["gflops"].items():
        print(f"{name:20s} {rate:8.0f} GFLOP/s")
    for name in (n.removeprefix("kernel, ") for n in result["gflops"] if n.startswith("kernel")):
        print(f"kernel / peak, {name}: {result['gflops'][f'kernel, {name}'] / result['gflops'][f'peak, {name}']:.2f}")
    result["peak_megabytes"] = {
        "direct": peak_bytes(lambda: layer.direct(0)) / 1e6,
        "kernel, cached": peak_bytes(lambda: layer.call(one, keys=keys[:1], **cached)) / 1e6,
    }
    for name, size in result["peak_megabytes"].items():
        print(f"peak memory beyond the operator, {name}: {size:.1f} MB")
    result["instruction set"] = isa
    print(json.dumps(result))
    write_result(args.out, result)


if __name__ == "__main__":
    main()
