"""Is the chosen path the best one on this processor? `python benchmarks/paths.py [--out F]`

Every path of every kernel (each instruction set, and torch where it computes the same) runs at the sizes of a model, in
turn within one run, and the path that "auto" takes is named beside the best. The choices are those of a calibration of
this machine, which is made anew first (`mllm-fast tune`).

- prefill: 32 heads of 128, N = 640 and 2,048, image -> query knocked out, with its share of the multiply-add peak
  (which takes its turns with the paths);
- few rows and one row: 8, 16 and 32 rows, and one, over 640 keys, nothing knocked out;
- linear layers of d = 1,024 for 1 to 600 rows: the kernel and torch;
- scores of 16 and 600 positions over 32,064 words; the values of ten heads; layers of a decoder for 1 and 32 rows.

A gate comes first: each path gives what the first one gives, to rounding. Figures are medians; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from harness import in_turn, machine, median, write_result
from mllm_fast.kernels import Base, Unembedding, paths, segment_table, tuning
from mllm_fast.kernels.decoder_layers import DecoderLayers, KeyStore, LayerWeights, LinearWeights, NormWeights, Part
from mllm_fast.kernels.decoder_layers import cpu_kernel as layers_kernel
from mllm_fast.kernels.extension import cpu_extension
from mllm_fast.kernels.knockout_attention import cpu_kernel as attention_kernel
from mllm_fast.kernels.knockout_attention import sdpa
from mllm_fast.kernels.logprob_increase import cpu_kernel as increase_kernel
from mllm_fast.kernels.skinny_linear import cpu_kernel as linear_kernel
from mllm_fast.kernels.weighted_values import cpu_kernel as weighted_kernel
from torch import Tensor

HEADS, WIDTH, WORDS = 32, 128, 32_064
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PAIRS, NO_PAIRS = (
    "avx512_bf16",
    ("scores", "values", "attention of 1 "),
)  # what has no path of its own for pairs of bfloat16
Runs = dict[str, Callable[[], Tensor]]


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def attention(sets: list[str], dtype: torch.dtype, keys: int, rows: int) -> tuple[Runs, float]:
    """The runs, and the useful floating-point operations."""
    query, key, value = (drawn(1, HEADS, n, WIDTH).to(dtype) for n in (rows, keys, keys))
    ids = torch.full((1, keys), 2, dtype=torch.uint8)
    ids[:, :5], ids[:, 5 : keys - 64] = 0, 1
    closed = (ids, segment_table([(1, 2)])) if rows == keys else (None, None)
    given = query, key, value, *closed, None, WIDTH**-0.5
    runs: Runs = {isa: lambda isa=isa: attention_kernel.attention(*given, False, False, isa=isa)[0] for isa in sets}
    runs["torch"] = partial(sdpa.attention, *given)
    open_pairs = rows * (2 * keys - rows + 1) / 2 - (64 * (keys - 69) if rows == keys else 0)
    return runs, 4.0 * HEADS * WIDTH * open_pairs


def increase(sets: list[str], dtype: torch.dtype, positions: int) -> Runs:
    unembedding = Unembedding((drawn(WORDS, 256) / 16).to(dtype), torch.ones(256, dtype=dtype))
    residual = drawn(1, 256)
    base = Base(residual, torch.tensor([1]), unembedding, final=residual)
    rest = (
        drawn(4, positions, WIDTH),
        None,
        (drawn(WORDS, WIDTH) / 11).to(dtype),
        None,
        torch.zeros(4, dtype=torch.long),
    )
    return {isa: partial(increase_kernel.increase, base, *rest, isa=isa) for isa in sets}


def weighted(sets: list[str], dtype: torch.dtype) -> Runs:
    keys = [drawn(HEADS, 640, WIDTH).to(dtype) for _ in range(8)]
    heads = [(i % 8, 3 * i) for i in range(10)]
    rest = drawn(8, HEADS, WIDTH).to(dtype), keys, keys, heads, 640, [WIDTH**-0.5] * 8, [None] * 8
    return {isa: partial(weighted_kernel.weighted_values, *rest, isa=isa) for isa in sets}


def linear(dtype: torch.dtype, rows: int, isa: str) -> Runs:
    weights = [drawn(1024, 1024).to(dtype) for _ in range(16)]
    x, place = drawn(rows, 1024).to(dtype), [0]

    def each(compute: Callable) -> Tensor:
        for _ in range(4):
            place[0] += 1
            compute(x, weights[place[0] % 16])
        return compute(x, weights[0])

    return {
        isa: partial(each, lambda x, w: linear_kernel.linear(x, w, None, isa)),
        "torch": partial(each, torch.nn.functional.linear),
    }


def layers(sets: list[str], dtype: torch.dtype, rows: int) -> Runs:
    hidden, inner, heads, count = 1024, 2816, 16, 4
    norm, none = NormWeights(torch.ones(hidden, dtype=dtype), 1e-6), NormWeights(None)

    def part(out: int, deep: int) -> LinearWeights:
        return LinearWeights((drawn(out, deep) / deep**0.5).to(dtype))

    square = [part(hidden, hidden) for _ in range(4)]
    wide, down = part(inner, hidden), part(hidden, inner)
    each = [LayerWeights(norm, none, none, norm, *square, wide, wide, down, 0.125) for _ in range(count)]
    decoder = DecoderLayers(each, norm, heads, heads)
    keys = [drawn(1, heads, 640, 64).to(dtype) for _ in range(count)]
    places = torch.tensor([(0, 640 - rows + row) for row in range(rows)])
    entries = torch.tensor([(row, 0, 0, 641 - rows + row, 640 - rows + row) for row in range(rows)])
    turn = torch.ones(rows, 64, dtype=dtype)
    given = drawn(rows, hidden).to(dtype), turn, 0 * turn, KeyStore(keys, keys, places), [Part(keys, keys, entries)], ()
    made = {isa: layers_kernel.prepare(decoder, isa) for isa in sets}
    return {isa: lambda run=run: run(*given).normed for isa, run in made.items()}


def gate(name: str, runs: Runs, dtype: torch.dtype) -> None:
    first, *others = (run().double() for run in runs.values())
    allowed = (3e-5 if dtype == torch.float32 else 0.05) * float(first.abs().max())
    for path, one in zip(list(runs)[1:], others, strict=True):
        if not float((one - first).abs().max()) <= allowed:
            raise SystemExit(f"{name}: {path} gives something else: no figures for a wrong contender")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None, help="write the JSON line here too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    extension, _ = cpu_extension()
    sets = [one for one in extension.instruction_sets() if one != "plain"] or ["plain"]
    found = tuning.tune()

    def rate() -> float:
        return extension.fma_rate(args.threads, "avx512" if "avx512" in sets else sets[0]) / 1e9

    peak = rate()
    result: dict = {"benchmark": "paths", "machine": machine(), "rounds": args.rounds, "peak gflops": peak, "rows": {}}
    print(f"peak of float32 multiply-adds: {peak:.0f} GFLOP/s; rows of linear layers: {found.rows}")

    def measure(name: str, runs: Runs, dtype: torch.dtype, chosen: str, flops: float = 0, often: int = 1) -> None:
        same = PAIRS in runs and "avx512" in runs and (dtype == torch.float32 or name.startswith(NO_PAIRS))
        if same:  # one code under two names
            del runs[PAIRS]
            chosen = "avx512" if chosen == PAIRS else chosen
        gate(name, runs, dtype)
        peaks: list[float] = []  # of the moments of this row: what a shared processor gives changes by the second
        beside = {"peak": lambda: peaks.append(rate())} if flops else {}
        took = {path: median(all_) * 1e3 for path, all_ in in_turn(runs | beside, args.rounds * often, 2).items()}
        took.pop("peak", None)
        best = min(took, key=took.__getitem__)
        row = {"ms": took, "chosen": chosen, "chosen over best": took[chosen] / took[best]}
        if flops and dtype == torch.float32:
            row["peak gflops"] = median(peaks)
            row["share of the peak"] = flops / took[chosen] / 1e6 / row["peak gflops"]
        result["rows"][name] = row
        share = f", {row['share of the peak']:.0%} of the peak" if "share of the peak" in row else ""
        each = ", ".join(f"{path} {ms:.3g}" for path, ms in took.items())
        print(f"{name:44s} {each} ms; chosen {chosen}, {row['chosen over best']:.2f} of the best{share}", flush=True)

    for kind, dtype in DTYPES.items():
        for rows, keys in ((640, 640), (2048, 2048), (32, 640), (16, 640), (8, 640), (1, 640)):
            use = attention_kernel.kind_of(rows)
            runs, flops = attention(sets, dtype, keys, rows)
            chosen = paths.path_of("knockout_attention", dtype, use)
            name = f"attention of {rows} rows over {keys} keys, {kind}"
            measure(name, runs, dtype, chosen, flops if rows == keys else 0, 1 if rows == keys else 5)
        for rows in (1, 2, 8, 32, 64, 256, 600):
            isa, (least, most) = paths.path_of("skinny_linear", dtype), found.rows[kind]
            chosen = isa if least <= rows <= most else "torch"
            measure(f"linear layers of {rows} rows, {kind}", linear(dtype, rows, isa), dtype, chosen, often=2)
        for positions in (16, 600):
            chosen = paths.path_of("logprob_increase", dtype)
            measure(f"scores of {positions} positions, {kind}", increase(sets, dtype, positions), dtype, chosen)
        chosen = paths.path_of("weighted_values", dtype)
        measure(f"values of ten heads, {kind}", weighted(sets, dtype), dtype, chosen, often=5)
        for rows in (1, 32):
            chosen = paths.path_of("decoder_layers", dtype)
            measure(f"decoder layers, {rows} rows, {kind}", layers(sets, dtype, rows), dtype, chosen)
    print(json.dumps(result))
    write_result(args.out, result)


if __name__ == "__main__":
    main()
