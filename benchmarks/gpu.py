"""The kernels' figures on a GPU: `python benchmarks/gpu.py [--quick] [--out FILE]`.

- prefill: attention under a causal mask and with the image knocked out for the query, beside SDPA with a boolean mask,
  flash and cuDNN attention (causal, so without the knockout), compiled FlexAttention with a prepared block mask;
- decode: a row, with and without the knockout, eager and as CUDA graphs;
- by-products: what the log-sum-exp and the mass add to prefill;
- scoring: 576 positions of all 32 x 32 heads of LLaVA-1.5-7B's sizes in one call, beside the direct way;
- compaction: the kept rows of a cache of 32 layers;
- model: tokens of a LLaVA of 7B random weights, with the image knocked out, streamed and explained.

Every contender's error against float64 comes first, for all sections: no figure is printed where one is wrong. A
contender that cannot run here is named with the reason. Times are medians of CUDA events, contenders in turn, the
second cache flushed before each. Rates are over useful work: the pairs and bytes that the contender's own mask leaves
open. The last line is JSON.

Without a GPU: `--rehearse` runs all that needs none once, at tiny sizes on the CPU with plain torch for the kernels,
and holds no times.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from gpu_attention import SYSTEM_TOKENS, ByProducts, Decode, Prefill, with_times
from gpu_measure import OURS, Bench, bf16_rounding, device_facts, gate, rates, slug
from gpu_model import Tokens
from harness import machine, write_result
from mllm_fast.kernels import OperatorCache, Unembedding, logprob_increase, topk_compaction
from mllm_fast.kernels.logprob_increase.reference import logprob_increase as reference
from mllm_fast.kernels.topk_compaction.torch_kernel import compact
from torch import Tensor

# layers, heads of each, scored positions, vocabulary, width, width of a head; LLaVA-1.5-7B's
MODEL, TINY_MODEL = (32, 32, 576, 32_064, 4096, 128), (2, 3, 12, 320, 64, 16)
QUICK_LAYERS = 4
GOAL_TIMES, GOAL_MS = 50, 20  # for all of MODEL
# layers, key heads, positions, width of a head, image tokens
CACHE, TINY_CACHE = (32, 8, 2048, 128, 1800), (2, 2, 40, 16, 20)
ROUNDS, FEWEST_ROUNDS = 25, 20


class Scoring:
    """Positions of all heads of all layers, operators cached, in one call."""

    title = "scoring, bf16: the host's time counted"

    def gate(self, bench: Bench) -> None:
        """A head of each layer, of one call over all, by twice what the direct way errs in bf16 and a bf16 rounding."""
        model = Model(bench)
        self.error = self.direct_error = 0.0
        for values in (model.values, model.large):
            scores = model.ours(values)
            for head in model.picked():
                truth = model.truth(head, values)
                wrong = {"factored": scores[head], "direct": model.direct(slice(head, head + 1), values)[0]}
                errors = {name: float((one.double() - truth).abs().max()) for name, one in wrong.items()}
                gate(f"scoring, head {head}", errors, errors["direct"], bf16_rounding(float(truth.abs().max())))
                if values is model.values:
                    self.error = max(self.error, errors["factored"])
                    self.direct_error = max(self.direct_error, errors["direct"])

    def measure(self, bench: Bench) -> list[dict]:
        model = Model(bench)
        heads, positions, depth = model.values.shape
        vocab, width = model.unembedding.weight.shape
        some = model.some
        model.ours(model.values)  # makes the operators
        part = slice(0, some)
        runs = {
            "factored": lambda: model.ours(model.values),
            "large writes": lambda: model.ours(model.large),
            "direct": lambda: model.direct(part, model.values),
        }
        ms = bench.times(runs, queued=False)
        sizes = {"layers": model.layers, "heads": heads, "positions": positions, "vocab": vocab, "width": width}
        row: dict = {**sizes, "depth": depth, "error": self.error, "direct_error": self.direct_error}
        print(f"{heads} heads of {model.layers} layers x {positions} positions, V {vocab}, d {width}, d_head {depth}")
        print(f"  error {self.error:.1e}; the direct way's {self.direct_error:.1e}")
        if ms:
            direct = ms["direct"] / some * heads
            row |= {
                "ms": ms["factored"],
                "large_writes_ms": ms["large writes"],
                "direct_measured_heads": some,
                "direct_ms_scaled": direct,
                "times_faster": direct / ms["factored"],
                "products_ms": 2 * heads * positions * vocab * depth / bench.rates["bf16_tflops"] / 1e9,
                "operators_gb": model.cache.nbytes / 1e9,
                "goal_ms": GOAL_MS,
                "goal_times": GOAL_TIMES,
            }
            print(f"  factored, one call, operators cached ({row['operators_gb']:.1f} GB): {row['ms']:.2f} ms")
            print(
                f"  goal {GOAL_MS} ms; where no write is small enough for the moments {row['large_writes_ms']:.2f} ms"
            )
            print(f"  the products of all words and writes alone: {row['products_ms']:.2f} ms at the device's rate")
            print(f"  direct: {direct:.0f} ms, scaled by count from {some} heads measured in {ms['direct']:.2f} ms")
            print(f"  factored is {row['times_faster']:.1f} times faster; goal {GOAL_TIMES}", flush=True)
            if model.layers < MODEL[0]:
                print(f"  the goals are for {MODEL[0]} layers: this was a quick run")
        return [row]


class Model:
    """Random weights and one explained row of each layer, the same in every run."""

    def __init__(self, bench: Bench):
        sizes = TINY_MODEL if bench.rehearsal else MODEL
        self.layers, per_layer, positions, vocab, width, depth = sizes
        if bench.quick:
            self.layers = min(self.layers, QUICK_LAYERS)
        self.backend = bench.backend
        draw = bench.draw(3)
        heads = self.layers * per_layer
        self.some = min(heads, 16)  # heads that the direct way is measured on
        uniform = partial(torch.rand, device=bench.device, generator=torch.Generator(bench.device).manual_seed(4))
        self.unembedding = Unembedding(
            weight=draw(vocab, width) / width**0.5, gain=(uniform(width) + 0.5).to(bench.dtype)
        )
        self.projection = draw(heads, width, depth).div_((per_layer * depth) ** 0.5)
        self.values = draw(heads, positions, depth) * (uniform(heads, positions, 1) ** 8).to(bench.dtype)
        self.residual, self.final = draw(self.layers, width), 2 * draw(self.layers, width)
        self.tokens = torch.arange(self.layers, device=bench.device) * 7 + 123
        self.source = torch.arange(heads, device=bench.device) // per_layer
        self.cache, self.keys = OperatorCache(1 << 34), list(range(heads))
        self.large = 4 * draw(heads, positions, depth)  # writes of which none is small

    def picked(self) -> list[int]:
        """A head of each layer, each another, and the last."""
        heads = len(self.values)
        return sorted({*range(0, heads, heads // self.layers + 1), heads - 1})

    def ours(self, values: Tensor) -> Tensor:
        """All heads in one call, [heads, positions]."""
        return logprob_increase(
            self.residual,
            values,
            self.tokens,
            self.unembedding,
            projection=self.projection,
            final=self.final,
            source=self.source,
            way="factored",
            operators=self.cache,
            keys=self.keys,
            backend=self.backend,
        )

    def direct(self, part: slice, values: Tensor, at_once: int = 4) -> Tensor:
        """Project, norm, unembed, log-softmax in bf16, the log-softmax in float32; a few heads at a time."""
        found = []
        for first in range(part.start, part.stop, at_once):
            some = slice(first, min(first + at_once, part.stop))
            source, u = self.source[some], self.unembedding
            scale = torch.rsqrt(self.final[source].float().square().mean(-1) + u.eps).to(u.weight.dtype)
            before = self.residual[source][:, None]
            rows = torch.cat([before, before + values[some] @ self.projection[some].mT], 1)
            logits = (rows * scale[:, None, None] * u.gain) @ u.weight.T
            at = self.tokens[source][:, None, None].expand(-1, logits.shape[1], 1)
            logs = torch.log_softmax(logits, -1, dtype=torch.float32).gather(-1, at)[..., 0]
            found.append(logs[:, 1:] - logs[:, :1])
        return torch.cat(found)

    def truth(self, head: int, values: Tensor) -> Tensor:
        """The definition in float64, [positions]."""
        layer = int(self.source[head])
        gain = self.unembedding.gain
        wide = Unembedding(self.unembedding.weight.double(), None if gain is None else gain.double())
        at = slice(layer, layer + 1)
        return reference(
            self.residual[at].double(),
            values[head : head + 1].double(),
            self.tokens[at],
            wide,
            projection=self.projection[head : head + 1].double(),
            final=self.final[at].double(),
        )[0]


class Compaction:
    """The 5 % most attended image positions of each layer, and all others."""

    title = "compaction, bf16: the host's time counted; GB/s of the kept rows, read once and written once"

    def gate(self, bench: Bench) -> None:
        """The definition's result, bit for bit: nothing is computed."""
        arguments, plain = self._problem(bench)
        got = topk_compaction(**arguments, backend=bench.backend)
        for one, truth in zip(got, compact(*plain), strict=True):
            if not torch.equal(one, truth):
                raise SystemExit("compaction: not the definition's result: no figures for a wrong contender")

    def _problem(self, bench: Bench) -> tuple[dict, tuple]:
        layers, heads, positions, depth, tokens = TINY_CACHE if bench.rehearsal else CACHE
        image = slice(SYSTEM_TOKENS, SYSTEM_TOKENS + tokens)
        draw = bench.draw(5)
        mass = draw(layers, positions).float().abs()
        keys, values = ([draw(heads, positions, depth) for _ in range(layers)] for _ in range(2))
        candidates = torch.zeros(positions, dtype=torch.bool, device=bench.device)
        candidates[image] = True
        keep = tokens // 20
        arguments = {"keep": keep, "candidates": candidates, "always": ~candidates}
        count = keep + int(arguments["always"].sum())
        plain = (mass, keys, values, keep, candidates, ~candidates, count)
        return {"mass": mass, "keys": keys, "values": values, **arguments}, plain

    def measure(self, bench: Bench) -> list[dict]:
        arguments, plain = self._problem(bench)
        runs = {
            OURS: lambda: topk_compaction(**arguments, backend=bench.backend),
            "plain torch": lambda: compact(*plain),
        }
        layers, (heads, positions, depth), kept = len(plain[1]), plain[1][0].shape, plain[-1]
        sizes = {"layers": layers, "kv_heads": heads, "positions": positions, "depth": depth, "kept": kept}
        rows = [{**sizes, "contender": name} for name in runs]
        with_times(rows, bench.times(runs, queued=False))
        print(f"{layers} layers, {heads} heads, {kept} of {positions} positions kept")
        for row in rows:
            text = ""
            if "ms" in row:
                row["gb_per_s"] = 2 * 2 * layers * heads * kept * depth * 2 / row["ms"] / 1e6
                row["of_copy"] = row["gb_per_s"] / bench.rates["copy_gb_per_s"]
                text = f" {row['ms']:8.3f} ms {row['over_ours']:5.2f} x ours {row['gb_per_s']:6.0f} GB/s"
                text += f" {row['of_copy']:4.0%} of a copy"
            print(f"  {row['contender']:12s}{text}", flush=True)
        return rows


SECTIONS = {
    "prefill": Prefill,
    "decode": Decode,
    "by-products": ByProducts,
    "scoring": Scoring,
    "compaction": Compaction,
    "model": Tokens,
}


def measure(bench: Bench, names: list[str], keep: Callable[[dict], None]) -> dict:
    """All gates, then all figures. `keep` gets what there is after each section but the last: machines are lent for a
    time, and a run that is cut off loses the section it was in, which is named, and not all."""
    result: dict = {"benchmark": "gpu", "rehearsal": bench.rehearsal, "quick": bench.quick, "machine": machine()}
    if not bench.rehearsal:
        result |= {"device": device_facts(), "rounds": bench.rounds}
        print(", ".join(f"{name} {value}" for name, value in result["device"].items()), flush=True)
    sections = {}
    for name in names:
        section = SECTIONS[name]()
        print(f"{name}: checking every contender against float64", flush=True)
        try:
            section.gate(bench)
            sections[name] = section
        except torch.OutOfMemoryError as error:
            bench.leave_out("the whole section", name, f"too little memory: {str(error).split('.')[0]}")
    result["rates"] = bench.rates = rates(bench)
    for name, rate in bench.rates.items():
        print(f"{name}: {rate:.0f}")
    waiting = list(sections)
    for name, section in sections.items():
        print(f"\n{section.title}")
        result[name] = section.measure(bench)
        waiting.remove(name)
        if waiting:
            keep({**result, "left_out": reasons(bench), "unfinished": list(waiting)})
    return {**result, "left_out": reasons(bench)}


def reasons(bench: Bench) -> list[dict]:
    """Who did not run, why, and in which cases."""
    return [{"contender": name, "reason": reason, "cases": cases} for (name, reason), cases in bench.left_out.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sizes: shorter sequences, 4 layers to score")
    parser.add_argument("--rehearse", action="store_true", help="prove on the CPU that the script runs; no times")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="write the JSON here, after each section; default: benchmarks/results, at the end",
    )
    args = parser.parse_args()
    if args.rehearse and args.out is not None:
        parser.error("--out is for figures, and a rehearsal holds none")
    if args.rounds < FEWEST_ROUNDS:
        parser.error(f"--rounds is {FEWEST_ROUNDS} or more, got {args.rounds}")
    if not args.rehearse and not torch.cuda.is_available():
        print("gpu.py needs a CUDA device, and torch sees none; --rehearse runs without one", file=sys.stderr)
        raise SystemExit(2)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cold:
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):  # first calls compile in earnest
            os.environ[name] = str(Path(cold) / name)
        result = measure(
            Bench(args.rehearse, args.quick, args.rounds, cold), args.only, partial(write_result, args.out)
        )
    out = args.out
    if out is None and not args.rehearse and args.only == list(SECTIONS):
        kind = "-quick" if args.quick else ""
        out = Path(__file__).parent / "results" / f"gpu-{slug(result['device']['name'])}{kind}.json"
    print(json.dumps(result))
    write_result(out, result)


if __name__ == "__main__":
    main()
