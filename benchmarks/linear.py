"""How fast are linear layers of few rows? `python benchmarks/linear.py`: those of a language model, one after another.

Contenders, in float32 and bfloat16, for one row (a decoder's step) to 64 (many questions together): the C++ kernel of
`skinny_linear`, whatever "auto" would choose, and torch's own. The weights (d = 1,024, 16 layers) are larger than the
caches, as a model's are: each pass reads all of them from memory.

A gate comes first: the kernel's error to float64 is at most twice torch's in the same type, and a rounding of the
largest output. Figures are medians of passes in turn; last comes one JSON line.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from harness import in_turn, machine, median, write_result
from mllm_fast.kernels.skinny_linear import cpu_kernel
from torch import Tensor
from torch.nn.functional import linear

WIDTH, INNER, LAYERS = 1024, 2816, 16
SHAPES = [(WIDTH, WIDTH)] * 4 + [(INNER, WIDTH)] * 2 + [(WIDTH, INNER)]
ROWS = (1, 2, 6, 12, 32, 64)


def through(compute, weights: list[Tensor], inputs: dict[int, Tensor]) -> Tensor:
    """One pass over the model's weights; the last output."""
    for weight in weights:
        out = compute(inputs[weight.shape[1]], weight)
    return out


def gate(weight: Tensor, x: Tensor) -> None:
    truth = linear(x.double(), weight.double())
    error, torchs = (float((one.double() - truth).abs().max()) for one in (ours(x, weight), linear(x, weight)))
    allowed = 2 * torchs + torch.finfo(x.dtype).eps * float(truth.abs().max())
    if not error <= allowed:
        raise SystemExit(f"kernel: error {error:.1e}, allowed {allowed:.1e}: no figures for a wrong contender")


def ours(x: Tensor, weight: Tensor) -> Tensor:
    return cpu_kernel.linear(x, weight, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--out", type=Path, default=None, help="write the JSON line here too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result: dict = {"benchmark": "linear", "machine": machine(), "rounds": args.rounds, "ms": {}}
    for dtype in (torch.float32, torch.bfloat16):
        gen = torch.Generator().manual_seed(0)
        weights = [torch.randn(*shape, generator=gen).to(dtype) for _ in range(args.layers) for shape in SHAPES]
        size = sum(weight.nbytes for weight in weights)
        name = str(dtype).removeprefix("torch.")
        result["ms"][name], result[f"{name} megabytes"] = {}, size / 1e6
        for rows in ROWS:
            inputs = {width: torch.randn(rows, width, generator=gen).to(dtype) for width in (WIDTH, INNER)}
            for weight in weights[: len(SHAPES)]:
                gate(weight, inputs[weight.shape[1]])
            runs = {
                "kernel": partial(through, ours, weights, inputs),
                "torch": partial(through, linear, weights, inputs),
            }
            took = {one: median(seconds) for one, seconds in in_turn(runs, args.rounds).items()}
            result["ms"][name][str(rows)] = {one: seconds * 1e3 for one, seconds in took.items()}
            ours_s, torch_s = took["kernel"], took["torch"]
            print(
                f"{name}, {rows:2d} rows: kernel {ours_s * 1e3:6.1f} ms ({size / ours_s / 1e9:4.1f} GB/s),"
                f" torch {torch_s * 1e3:6.1f} ms, {torch_s / ours_s:.2f} times"
            )
    print(json.dumps(result))
    write_result(args.out, result)


if __name__ == "__main__":
    main()
