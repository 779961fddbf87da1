"""Of README's figures those of a GPU; see table.py."""

from __future__ import annotations

_MASKS = {"causal": "nothing", "image->query": "image"}
_FLEX = ("FlexAttention, dynamic=False", "FlexAttention, default")


def gpu(found: dict) -> list[str]:
    device, rates = found["device"], found["rates"]
    heads = [row for row in found["prefill"] if row["kv_heads"] == row["heads"]]
    chip = f"{device['name']} (torch {device['torch']}, Triton {device['triton']})"
    ceilings = f"{rates['bf16_tflops']:.0f} TFLOP/s and a copy {rates['copy_gb_per_s']:,.0f} GB/s"
    lines = [
        f"On an {chip}, where products of matrices make {ceilings}: bfloat16, 32 heads of 128, the device's time in µs."
        " SDPA with the mask and FlexAttention (the better of two ways to compile it) compute the same as the kernel;"
        " the causal ones knock nothing out:",
        "",
        "| prefill | kernel | SDPA, mask | FlexAttention | flash, causal | cuDNN, causal |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for mask, label in _MASKS.items():
        for positions in sorted({row["positions"] for row in heads}):
            rows = {r["contender"]: r for r in heads if (r["mask"], r["positions"]) == (mask, positions)}
            ours = rows["ours"]
            others = [
                rows["SDPA, mask"],
                min((rows[name] for name in _FLEX if name in rows), key=lambda row: row["ms"]),
                rows["SDPA, causal, flash"],
                rows["SDPA, causal, cuDNN"],
            ]
            figures = " | ".join(_against(row) for row in others)
            lines.append(
                f"| N = {positions:,}, knocked out: {label} | {_us(ours)} ({ours['tflops']:.0f} TFLOP/s) | {figures} |"
            )
    lines += [
        "",
        "| decode, one row, as CUDA graphs | kernel | SDPA, mask | SDPA, nothing out |",
        "| --- | ---: | ---: | ---: |",
    ]
    for batch in sorted({row["batch"] for row in found["decode"]}):
        for mask, label in _MASKS.items():
            for positions in sorted({row["positions"] for row in heads}):
                wanted = (batch, found["decode"][0]["heads"], mask, positions)
                rows = {
                    r["contender"]: r
                    for r in found["decode"]
                    if (r["batch"], r["kv_heads"], r["mask"], r["positions"]) == wanted
                }
                figures = " | ".join(_against(rows[f"SDPA, {name}, graph"]) for name in ("mask", "no mask"))
                ours = _us(rows["ours, graph"])
                lines.append(f"| batch {batch}, N = {positions:,}, knocked out: {label} | {ours} | {figures} |")
    eager = [r for r in found["decode"] if (r["batch"], r["heads"] - r["kv_heads"]) == (1, 0)]
    host = {name: [1e3 * r["ms"] for r in eager if r["contender"] == name] for name in ("ours", "SDPA, mask")}
    score = found["scoring"][0]
    lines += [
        "",
        f"Eager, launched from Python and the host's time counted, a row takes {min(host['ours']):.0f} to"
        f" {max(host['ours']):.0f} µs (SDPA with the mask {min(host['SDPA, mask']):.0f} to"
        f" {max(host['SDPA, mask']):.0f}). A new length compiles nothing; FlexAttention's first calls take"
        f" {_first(heads)}. Scoring {score['positions']} positions of all {score['heads']:,} heads of LLaVA-1.5-7B's"
        f" sizes in one call, operators cached ({score['operators_gb']:.1f} GB): {score['ms']:.1f} ms"
        f" ({score['times_faster']:.0f} times faster than the direct way in torch;"
        f" {score['large_writes_ms']:.1f} ms where no write is small).",
    ]
    return lines


def _us(row: dict) -> str:
    return f"{1e3 * row['ms']:,.3g}" if row["ms"] < 1 else f"{1e3 * row['ms']:,.0f}"


def _against(row: dict) -> str:
    return f"{_us(row)} ({row['over_ours']:.2f} x)"


def _first(rows: list[dict]) -> str:
    seconds = [row["first_call_s"] for row in rows if row["contender"] == "FlexAttention, dynamic=False"]
    return f"{min(seconds):.1f} to {max(seconds):.1f} s at each length"
