"""How fast is attention under a knockout? `python benchmarks/attention.py`: 32 heads of 128, on the CPU.

Layouts: N = 640 with 576 image tokens, N = 2,048 with 1,800; 5 system tokens before them, the query after. Prefill with
nothing knocked out and with image -> query; decoding one row, with nothing and with the image knocked out.

Contenders, in turn within one run:
- kernel: `knockout_attention`, in float32 and bfloat16;
- SDPA, mask: torch's scaled_dot_product_attention with the same boolean mask, in both types;
- SDPA, causal: without any knockout (of one row: without a mask);
- FlexAttention: compiled, its block mask made before the clock starts.

A gate comes first: a contender's error to float64 is at most twice that of SDPA with the mask in the same type, and a
rounding of the largest output. Figures are medians; last comes one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from harness import in_turn, machine, median, write_result
from mllm_fast.kernels import knockout_attention, segment_table
from mllm_fast.kernels.extension import cpu_extension
from mllm_fast.kernels.knockout_attention import cpu_kernel
from mllm_fast.kernels.paths import instruction_set
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

HEADS, WIDTH, SYSTEM = 32, 128, 5
LAYOUTS = {640: 576, 2048: 1800}
IMAGE, QUERY = 1, 2
Run = Callable[[], torch.Tensor]


class Case:
    """Random operands of one layout, the mask of one knockout, and the contenders that compute it."""

    def __init__(self, keys: int, rows: int, rules: list[tuple[int, int]], flex: Callable | None):
        gen = torch.Generator().manual_seed(keys)
        shape = (1, HEADS, keys, WIDTH)
        q, self.key, self.value = (torch.randn(shape, generator=gen) for _ in range(3))
        self.query = q[:, :, keys - rows :].contiguous()
        ids = torch.zeros(1, keys, dtype=torch.uint8)
        ids[:, SYSTEM:], ids[:, SYSTEM + LAYOUTS[keys] :] = IMAGE, QUERY
        self.segments, self.table, self.rules, self.rows = ids, segment_table(rules), rules, rows
        where = torch.arange(keys)
        seen = where <= where[keys - rows :, None]
        for source, target in rules:
            seen &= ~((ids[0, keys - rows :, None] == target) & (ids[0] == source))
        self.mask = seen
        self.flops = 4 * HEADS * WIDTH * int(seen.sum())
        self.flex = flex

    def operands(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.query.to(dtype), self.key.to(dtype), self.value.to(dtype)

    def contenders(self) -> dict[str, tuple[Run, torch.dtype, bool]]:
        """Name -> what runs, its type, and whether it computes this mask (else it is another's speed beside ours)."""
        full, half = self.operands(torch.float32), self.operands(torch.bfloat16)
        rules = {"segments": self.segments, "table": self.table} if self.rules else {}
        one = self.rows == 1
        found: dict[str, tuple[Run, torch.dtype, bool]] = {}
        # each type's operands are used in one go, ours first: all kernels find them as far away
        for name, (q, k, v) in {"": full, " bf16": half}.items():
            found[f"kernel{name}"] = partial(self._kernel, q, k, v, rules), q.dtype, True
            found[f"SDPA, mask{name}"] = partial(sdpa, q, k, v, attn_mask=self.mask), q.dtype, True
            if name:
                continue
            found["SDPA, causal"] = partial(sdpa, q, k, v, is_causal=not one), q.dtype, not self.rules
            if self.flex is not None:
                block = create_block_mask(self.rule(), None, None, self.rows, self.key.shape[2], device="cpu")
                found["FlexAttention"] = partial(self.flex, q, k, v, block_mask=block), q.dtype, True
        return found

    @staticmethod
    def _kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rules: dict) -> torch.Tensor:
        return knockout_attention(q, k, v, **rules).output

    def rule(self) -> Callable:
        """The mask as FlexAttention takes it."""
        ids, rules = self.segments[0].long(), self.rules

        def seen(b, h, row, key):
            open_ = row >= key
            for source, target in rules:
                open_ = open_ & ~((ids[row] == target) & (ids[key] == source))
            return open_

        return seen

    def gate(self, contenders: dict[str, tuple[Run, torch.dtype, bool]]) -> dict[str, float]:
        """Largest errors; fails where one exceeds what SDPA with the mask in the same type may take twice."""
        truth = sdpa(*self.operands(torch.float64), attn_mask=self.mask)
        errors = {
            name: float((run().double() - truth).abs().max()) for name, (run, _, same) in contenders.items() if same
        }
        for name, error in errors.items():
            dtype = contenders[name][1]
            base = errors["SDPA, mask" if dtype == torch.float32 else "SDPA, mask bf16"]
            allowed = 2 * base + torch.finfo(dtype).eps * float(truth.abs().max())
            if not error <= allowed:
                raise SystemExit(f"{name}: error {error:.1e}, allowed {allowed:.1e}: no figures for a wrong contender")
        return errors


def measure(case: Case, rounds: int) -> dict[str, dict[str, float]]:
    contenders = case.contenders()
    errors = case.gate(contenders)
    times = in_turn({name: run for name, (run, _, _) in contenders.items()}, rounds, warm_up=2)
    ours = median(times["kernel"])
    rows: dict[str, dict[str, float]] = {}
    for name, seconds in times.items():
        took = median(seconds)
        rows[name] = {"ms": took * 1e3, "against_kernel": took / ours}
        if name in errors:
            rows[name] |= {"gflops": case.flops / took / 1e9, "error": errors[name]}
    return rows


def paths(case: Case, rounds: int) -> dict[str, float]:
    """Milliseconds of the kernel on each instruction set, in both types."""
    extension, _ = cpu_extension()
    rest = (case.segments, case.table, None, WIDTH**-0.5, False, False)
    runs = {}
    for name, dtype in (("", torch.float32), (" bf16", torch.bfloat16)):
        for isa in extension.instruction_sets():
            runs[isa + name] = partial(cpu_kernel.attention, *case.operands(dtype), *rest, isa=isa)
    return {name: median(seconds) * 1e3 for name, seconds in in_turn(runs, rounds).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None, help="write the JSON line here too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    flex = torch.compile(flex_attention, dynamic=False)
    result: dict = {"benchmark": "attention", "machine": machine(), "rounds": args.rounds, "cases": {}, "paths": {}}
    for keys in LAYOUTS:
        for knocked, rules in (("nothing", []), ("image -> query", [(IMAGE, QUERY)])):
            for what, rows in (("prefill", keys), ("decode", 1)):
                case = Case(keys, rows, rules, flex if rows > 1 else None)
                name = f"{what}, N = {keys}, knocked out: {knocked}"
                result["cases"][name] = found = measure(case, args.rounds if rows > 1 else args.rounds * 40)
                print(name)
                for contender, row in found.items():
                    detail = f"{row['gflops']:6.0f} GFLOP/s  error {row['error']:.1e}" if "gflops" in row else ""
                    print(f"  {contender:16s} {row['ms']:8.3f} ms  {row['against_kernel']:6.2f} of ours  {detail}")
                if rows > 1 and rules:
                    result["paths"][str(keys)] = each = paths(case, 3)
                    print("  by instruction set:", ", ".join(f"{isa} {ms:.1f} ms" for isa, ms in each.items()))
    result["chosen"] = {
        f"{kind}{name}": instruction_set("knockout_attention", dtype, kind)
        for kind in ("prefill", "few rows", "one row")
        for name, dtype in (("", torch.float32), (" bf16", torch.bfloat16))
    }
    result["instruction set"] = result["chosen"]["prefill"]
    print("chosen:", ", ".join(f"{kind} {path}" for kind, path in result["chosen"].items()))
    print(json.dumps(result))
    write_result(args.out, result)


if __name__ == "__main__":
    main()
