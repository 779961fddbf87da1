"""Attention's sections of gpu.py: prefill, decode, by-products. Each has a gate and, apart, its times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from types import FunctionType

import torch
from gpu_measure import OURS, Bench, Contender, Trial, bf16_rounding, gate, graphed
from mllm_fast.kernels import knockout_attention, segment_table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

SYSTEM_TOKENS = 5
LENGTHS = ((640, 576), (2048, 1800), (8192, 7680))  # positions, and how many of them are image tokens
HEADS = ((32, 32), (32, 8))  # of queries, and of keys and values
DEPTH = 128
TINY_LENGTHS, TINY_HEADS, TINY_DEPTH = ((40, 20), (56, 30)), ((4, 4), (4, 2)), 16
CAUSAL, KNOCKED = "causal", "image->query"
IMAGE, QUERY = 1, 2
WITH_MASK, REPEATED = "SDPA, mask", "SDPA, mask, heads repeated"


@dataclass(frozen=True)
class Case:
    """One problem: batch x heads, all rows of N positions (or the last alone), under a mask."""

    batch: int
    heads: int
    kv_heads: int
    depth: int
    positions: int
    image: int
    mask: str
    decode: bool = False

    def __str__(self) -> str:
        kind = "decode" if self.decode else "prefill"
        heads = f"{self.heads}/{self.kv_heads}x{self.depth}"
        return f"{kind} batch {self.batch} heads {heads} N {self.positions} {self.mask}"

    @property
    def rows(self) -> int:
        return 1 if self.decode else self.positions

    @property
    def fields(self) -> dict[str, object]:
        return {
            "batch": self.batch, "heads": self.heads, "kv_heads": self.kv_heads, "depth": self.depth,
            "positions": self.positions, "image": self.image, "mask": self.mask,
        }  # fmt: skip

    def visible(self, mask: str, device: torch.device) -> Tensor:
        """Which keys each row sees, bool [rows, N]; written out, not by way of segments."""
        key = torch.arange(self.positions, device=device)
        row = key[self.positions - self.rows :, None]
        seen = key <= row
        if mask == KNOCKED:
            end = SYSTEM_TOKENS + self.image
            seen &= ~((row >= end) & (key >= SYSTEM_TOKENS) & (key < end))
        return seen

    def operands(self, bench: Bench) -> tuple[Tensor, Tensor, Tensor]:
        draw = bench.draw(2)
        query = draw(self.batch, self.heads, self.rows, self.depth)
        key, value = (draw(self.batch, self.kv_heads, self.positions, self.depth) for _ in range(2))
        return query, key, value

    def segments(self, device: torch.device) -> dict[str, Tensor]:
        """The op's own arguments for the mask; none for the causal one."""
        if self.mask == CAUSAL:
            return {}
        ids = torch.zeros(1, self.positions, dtype=torch.uint8, device=device)
        ids[:, SYSTEM_TOKENS:] = IMAGE
        ids[:, SYSTEM_TOKENS + self.image :] = QUERY
        return {"segments": ids, "table": segment_table([(IMAGE, QUERY)], device)}


@cache
def open_pairs(case: Case, mask: str) -> int:
    """How many pairs of a row and a key that it sees: what work and bytes count."""
    return int(case.visible(mask, torch.device("cpu")).sum())


def prefill_cases(bench: Bench) -> Iterator[Case]:
    """Lengths innermost and in order: what compiles for a first length meets the others as new ones."""
    heads, lengths, depth = (TINY_HEADS, TINY_LENGTHS, TINY_DEPTH) if bench.rehearsal else (HEADS, LENGTHS, DEPTH)
    if bench.quick:
        heads, lengths = heads[:1], lengths[:2]
    for query_heads, kv_heads in heads:
        for mask in (CAUSAL, KNOCKED):
            for positions, image in lengths:
                yield Case(1, query_heads, kv_heads, depth, positions, image, mask)


def decode_cases(bench: Bench) -> Iterator[Case]:
    for batch in (1, 2) if bench.rehearsal else (1, 8):
        for one in prefill_cases(bench):
            yield Case(batch, one.heads, one.kv_heads, one.depth, one.positions, one.image, one.mask, decode=True)


def contenders(bench: Bench, case: Case) -> list[Contender]:
    """Every way of this case, its operands made once. Those without a knockout compute the causal mask."""
    query, key, value = case.operands(bench)
    grouped = case.heads != case.kv_heads
    options = {"enable_gqa": True} if grouped else {}
    mask = case.visible(case.mask, bench.device)[None, None]
    segments = case.segments(bench.device)
    plain = partial(sdpa, query, key, value, **options)
    masked = partial(plain, attn_mask=mask)
    whole = plain if case.decode else partial(plain, is_causal=True)  # is_causal counts a single row as the first

    def ours() -> Tensor:
        return knockout_attention(query, key, value, **segments, backend=bench.backend).output

    def repeated() -> Tensor:
        times = case.heads // case.kv_heads
        return sdpa(query, key.repeat_interleave(times, 1), value.repeat_interleave(times, 1), attn_mask=mask)

    found = [Contender(OURS, lambda: ours, case.mask), Contender(WITH_MASK, lambda: masked, case.mask)]
    if grouped:  # as transformers does; with enable_gqa torch may have to store the scores
        found.append(Contender(REPEATED, lambda: repeated, case.mask))
    if case.decode:
        return [*found, Contender("SDPA, no mask", lambda: whole, CAUSAL)]

    def under(backend: SDPBackend, run: Callable[[], Tensor]) -> Callable[[], Callable[[], Tensor]]:
        def attend() -> Tensor:
            with sdpa_kernel(backend):
                return run()

        return lambda: attend

    cudnn = SDPBackend.CUDNN_ATTENTION
    found += [
        Contender("SDPA, mask, cuDNN", under(cudnn, masked), case.mask, cuda_only=True),
        Contender("SDPA, causal, flash", under(SDPBackend.FLASH_ATTENTION, whole), CAUSAL, cuda_only=True),
        Contender("SDPA, causal, cuDNN", under(cudnn, whole), CAUSAL, cuda_only=True),
    ]
    for name in ("dynamic=False", "default"):

        def make(name: str = name) -> Callable[[], Tensor]:
            attend = compiled_flex(name, f"{case.heads}_{case.kv_heads}_{case.mask}")
            return partial(attend, query, key, value, block_mask(case, bench.device), grouped)

        found.append(Contender(f"FlexAttention, {name}", make, case.mask, cuda_only=True, compiles=True))
    return found


def block_mask(case: Case, device: torch.device):
    """FlexAttention's mask by arithmetic on positions, which costs it less than looking up segments; the image's
    end is data, so that a new length alone does not make it compile again."""
    end = torch.full((1,), SYSTEM_TOKENS + case.image, device=device)

    def causal(b, h, row, key):
        return row >= key

    def knocked(b, h, row, key):
        return (row >= key) & ((row < end[b]) | (key < SYSTEM_TOKENS) | (key >= end[b]))

    chosen = causal if case.mask == CAUSAL else knocked
    return create_block_mask(chosen, None, None, case.positions, case.positions, device=device)


def _attend(query, key, value, mask, grouped):
    return flex_attention(query, key, value, block_mask=mask, enable_gqa=grouped)


@cache
def compiled_flex(dynamic: str, group: str) -> Callable[..., Tensor]:
    """torch.compile keeps what it compiled, and what it saw, by code object and name: each gets its own."""
    name = "".join(c if c.isalnum() else "_" for c in f"attend_{dynamic}_{group}")
    own = FunctionType(_attend.__code__.replace(co_name=name), globals(), name)
    return torch.compile(own, dynamic=False if dynamic == "dynamic=False" else None, fullgraph=True)


def errors(case: Case, bench: Bench, trials: dict[str, Trial], mask: str) -> tuple[dict[str, float], float]:
    """Largest error of each output against float64 under `mask`, and the largest number there; a head at a time."""
    query, key, value = case.operands(bench)
    hidden = ~case.visible(mask, bench.device)
    worst = {name: torch.zeros((), dtype=torch.float64, device=bench.device) for name in (*trials, "")}
    for b in range(case.batch):
        for h in range(case.heads):
            k, v = (one[b, h * case.kv_heads // case.heads].double() for one in (key, value))
            scores = (query[b, h].double() @ k.T).mul_(case.depth**-0.5).masked_fill_(hidden, -torch.inf)
            truth = torch.softmax(scores, -1) @ v
            del scores
            worst[""] = torch.maximum(worst[""], truth.abs().max())
            for name, trial in trials.items():
                error = (trial.output[b, h].double() - truth).abs().max()  # type: ignore[index]
                worst[name] = torch.maximum(worst[name], error)
    largest = float(worst.pop(""))
    return {name: float(error) for name, error in worst.items()}, largest


def attention_gate(bench: Bench, case: Case, found: list[Contender]) -> list[dict]:
    """A row for each contender that ran, all within what SDPA with the mask errs in bf16; see `gate`."""
    trials = bench.first_runs(str(case), found)
    rows = []
    for mask in dict.fromkeys(trial.contender.computes for trial in trials.values()):
        ran = {name: trial for name, trial in trials.items() if trial.contender.computes == mask}
        reference = dict(ran)
        if mask != case.mask:  # SDPA with the mask of what these compute
            plain = contenders(bench, replace(case, mask=mask))
            masked = [one for one in plain if one.name in (WITH_MASK, REPEATED)]
            reference |= bench.first_runs(f"{case}, reference of {mask}", masked)
        name = next((n for n in (WITH_MASK, REPEATED) if n in reference), None)
        if name is None:
            raise SystemExit(f"{case}: {WITH_MASK} does not run here, and it is what the gate measures against")
        wrong, largest = errors(case, bench, reference, mask)
        allowed = gate(str(case), wrong, wrong[name], bf16_rounding(largest))
        for one, trial in ran.items():
            row = {**case.fields, "contender": one, "computes": mask, "error": wrong[one], "allowed": allowed}
            if not bench.rehearsal:
                row |= {"prepare_s": trial.prepare_s, "first_call_s": trial.first_call_s}
            rows.append(row)
    return rows


def with_times(rows: list[dict], ms: dict[str, float]) -> None:
    """Adds the times to the rows of one case, and each as a multiple of ours; of our graph for graphs."""
    for row in rows:
        name = row["contender"]
        ours = f"{OURS}, graph" if name.endswith(", graph") else OURS
        if name in ms:
            row["ms"] = ms[name]
        if name in ms and ours in ms:
            row["over_ours"] = ms[name] / ms[ours]


class Prefill:
    """All rows at once; host launches hidden."""

    title = "prefill, bf16, batch 1: launches are queued behind the flush, so these are the device's times"

    def gate(self, bench: Bench) -> None:
        if not bench.rehearsal:  # what Inductor sets up once is not FlexAttention's
            torch.compile(lambda x: x + 1)(torch.ones(8, device=bench.device))
        self.cases = [(case, attention_gate(bench, case, contenders(bench, case))) for case in prefill_cases(bench)]

    def measure(self, bench: Bench) -> list[dict]:
        for case, rows in self.cases:
            ran = {row["contender"] for row in rows}
            runs = {one.name: one.make() for one in contenders(bench, case) if one.name in ran}
            with_times(rows, bench.times(runs))
            print(f"{case}\n{bench.missing(str(case))}", end="")
            for row in rows:
                text = f"  {row['contender']:32s} error {row['error']:.1e}"
                if "ms" in row:
                    work = 4 * case.batch * case.heads * case.depth * open_pairs(case, row["computes"])
                    row["tflops"] = work / row["ms"] / 1e9
                    row["of_products"] = row["tflops"] / bench.rates["bf16_tflops"]
                    text += f"  {row['ms']:9.3f} ms {row['over_ours']:6.2f} x ours {row['tflops']:6.0f} TFLOP/s"
                    text += f" {row['of_products']:4.0%}  first call {row['first_call_s']:.2f} s"
                    if row["contender"].startswith("Flex"):
                        text += f", block mask {row['prepare_s']:.3f} s"
                print(text + ("" if row["computes"] == case.mask else f"  (computes {row['computes']})"), flush=True)
        found = [row for _, rows in self.cases for row in rows]
        if not bench.rehearsal:
            self._print_first_calls(found)
        return found

    def _print_first_calls(self, rows: list[dict]) -> None:
        print("first calls, at a first length and then at new ones")
        print("(FlexAttention compiles with empty caches, ours what this process has not compiled yet):")
        lines: dict[str, list[str]] = {}
        for row in rows:
            if row["contender"] == OURS or row["contender"].startswith("Flex"):
                line = f"{row['contender']}, heads {row['heads']}/{row['kv_heads']}, {row['mask']}"
                lines.setdefault(line, []).append(f"N {row['positions']}: {row['first_call_s']:.2f} s")
        for line, parts in lines.items():
            print(f"  {line:54s} {', '.join(parts)}", flush=True)


class Decode:
    """One row: eager, the host's time counted, and as CUDA graphs."""

    title = "decode, bf16: a row; bytes are those of the keys and values that the row sees"

    def _contenders(self, bench: Bench, case: Case) -> list[Contender]:
        eager = contenders(bench, case)
        return [*eager, *(graphed(one) for one in eager)]

    def gate(self, bench: Bench) -> None:
        self.cases = [
            (case, attention_gate(bench, case, self._contenders(bench, case))) for case in decode_cases(bench)
        ]

    def measure(self, bench: Bench) -> list[dict]:
        for case, rows in self.cases:
            ran = {row["contender"] for row in rows}
            runs = {one.name: one.make() for one in self._contenders(bench, case) if one.name in ran}
            graphs = {name: run for name, run in runs.items() if name.endswith("graph")}
            ms = bench.times({name: run for name, run in runs.items() if name not in graphs}, queued=False)
            with_times(rows, ms | bench.times(graphs))
            print(f"{case}\n{bench.missing(str(case))}", end="")
            for row in rows:
                text = f"  {row['contender']:34s} error {row['error']:.1e}"
                if "ms" in row:
                    size = 2 * case.batch * case.kv_heads * open_pairs(case, row["computes"]) * case.depth * 2
                    row["gb_per_s"] = size / row["ms"] / 1e6
                    row["of_copy"] = row["gb_per_s"] / bench.rates["copy_gb_per_s"]
                    ratio = f"{row['over_ours']:6.2f} x ours" if "over_ours" in row else " " * 13
                    text += f"  {row['ms']:8.4f} ms {ratio} {row['gb_per_s']:6.0f} GB/s {row['of_copy']:4.0%} of a copy"
                print(text + ("" if row["computes"] == case.mask else f"  (computes {row['computes']})"), flush=True)
        return [row for _, rows in self.cases for row in rows]


class ByProducts:
    """Prefill with the log-sum-exp, with the mass over the query's rows, with both, beside without."""

    title = "by-products of prefill: ours with and without"

    def _runs(self, bench: Bench, case: Case) -> dict[str, Callable]:
        query, key, value = case.operands(bench)
        chosen = torch.zeros(case.batch, case.rows, dtype=torch.bool, device=bench.device)
        chosen[:, SYSTEM_TOKENS + case.image :] = True
        call = partial(knockout_attention, query, key, value, **case.segments(bench.device), backend=bench.backend)
        return {
            OURS: call,
            "ours, lse": partial(call, lse=True),
            "ours, mass": partial(call, mass=chosen),
            "ours, lse and mass": partial(call, lse=True, mass=chosen),
        }

    def gate(self, bench: Bench) -> None:
        """Against float64, by twice what eager attention in bf16 errs, which stores its weights, and a float32
        rounding."""
        self.cases = []
        for case in prefill_cases(bench):
            if case.heads != case.kv_heads:
                continue
            got = self._runs(bench, case)["ours, lse and mass"]()
            query, key, _ = case.operands(bench)
            hidden = ~case.visible(case.mask, bench.device)
            wrong, low, largest = ({"lse": 0.0, "mass": 0.0} for _ in range(3))
            for h in range(case.heads):
                truth, eager = (
                    _by_products(query[0, h].to(t), key[0, h].to(t), hidden, SYSTEM_TOKENS + case.image)
                    for t in (torch.float64, bench.dtype)
                )
                for name, ours in (("lse", got.lse[0, h]), ("mass", got.mass[0, h])):
                    wrong[name] = _largest(wrong[name], ours.double() - truth[name])
                    low[name] = _largest(low[name], eager[name].double() - truth[name])
                    largest[name] = _largest(largest[name], truth[name])
            for name in wrong:
                rounding = torch.finfo(torch.float32).eps * largest[name]
                gate(f"{case}, {name}", {OURS: wrong[name]}, low[name], rounding)
            self.cases.append((case, {f"{name}_error": error for name, error in wrong.items()}))

    def measure(self, bench: Bench) -> list[dict]:
        found = []
        for case, wrong in self.cases:
            print(case)
            runs = self._runs(bench, case)
            rows = [{**case.fields, **wrong, "contender": name} for name in runs]
            with_times(rows, bench.times(runs))
            for row in rows:
                text = f"  {row['ms']:9.3f} ms {row['over_ours']:6.2f} x without" if "ms" in row else ""
                print(f"  {row['contender']:32s}{text}", flush=True)
            found += rows
        return found


def _largest(before: float, values: Tensor) -> float:
    """NaN, once there, stays."""
    now = float(values.abs().max())
    return before if now <= before or before != before else now


def _by_products(query: Tensor, key: Tensor, hidden: Tensor, first: int) -> dict[str, Tensor]:
    """Log-sum-exp of each row, mean weight of the rows from `first` on, of one head; as eager attention stores them."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query @ key.T * query.shape[1] ** -0.5).masked_fill(hidden, -torch.inf)
    alpha = torch.softmax(scores, -1, dtype=wide).to(query.dtype)
    return {"lse": torch.logsumexp(scores.to(wide), -1), "mass": alpha[first:].to(wide).mean(0)}
