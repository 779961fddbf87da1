"""Of README's figures those of the kernels; see table.py."""

from __future__ import annotations


def speed(scores: dict) -> list[str]:
    ways, rates = scores["ways"], scores["gflops"]
    lines = [
        "Scoring 600 positions of a head, sizes of LLaVA-1.5-7B (V = 32,064, d = 4,096, d_head = 128), float32:",
        "",
        "| way | ms a head | against direct | error against float64 |",
        "| --- | ---: | ---: | ---: |",
    ]
    names = {
        "direct": "direct: project, norm, unembed, log-softmax (torch)",
        "torch, cached": "factored in plain torch, operator cached",
        "kernel, cached": f"factored kernel ({scores['instruction set']}), cached, a layer's heads in one call",
        "kernel, on the fly": "the same, operators made in the call",
        "kernel, cached, one head alone": "one head alone: its own pass over the unembedding for the logits at h",
    }
    for name, label in names.items():
        way = ways[name]
        lines.append(f"| {label} | {way['ms_per_head']:.1f} | {way['times_faster']:.1f} x | {way['error']:.1e} |")
    sets = [name.removeprefix("kernel, ") for name in rates if name.startswith("kernel, ")]
    shares = ", ".join(
        f"{name} {rates[f'kernel, {name}']:.0f} of {rates[f'peak, {name}']:.0f}"
        f" ({rates[f'kernel, {name}'] / rates[f'peak, {name}']:.0%})"
        for name in sets
    )
    memory = scores["peak_megabytes"]
    lines += [
        "",
        f"GFLOP/s of each path against a register-only loop: {shares}; torch's sgemm {rates['sgemm']:.0f}. Peak memory"
        f" beyond the operator: {memory['kernel, cached']:.1f} MB, the direct way {memory['direct']:.0f} MB.",
    ]
    return lines


def attention(attention: dict) -> list[str]:
    isa = attention["instruction set"]
    lines = [
        "Attention with the image knocked out of the query, 32 heads of 128 (576 of 640 or 1,800 of 2,048 positions"
        f" are image), on the CPU, ms. The kernel is {isa}'s:",
        "",
        "| | kernel | kernel, bf16 | SDPA, mask | SDPA, mask, bf16 | SDPA causal, nothing out | FlexAttention |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    names = ("kernel", "kernel bf16", "SDPA, mask", "SDPA, mask bf16", "SDPA, causal", "FlexAttention")
    for case, rows in attention["cases"].items():
        label = case.replace("image -> query", "image")
        figures = [f"{rows[n]['ms']:.3g} ({rows[n]['against_kernel']:.1f} x)" if n in rows else "" for n in names]
        figures[0] = f"{rows['kernel']['ms']:.3g}"
        lines.append(f"| {label} | {' | '.join(figures)} |")
    rows = attention["cases"]["prefill, N = 2048, knocked out: image -> query"]
    lines += [
        "",
        f"Largest error to float64 there: kernel {rows['kernel']['error']:.1e}, SDPA {rows['SDPA, mask']['error']:.1e};"
        f" in bfloat16 {rows['kernel bf16']['error']:.1e} and {rows['SDPA, mask bf16']['error']:.1e}.",
    ]
    return lines


def tiles(attention: dict, scores: dict) -> list[str]:
    """Of another machine: what matrix tiles give. Decoding has no tiles, and has been rewritten since."""
    said = []
    for keys in (640, 2048):
        rows = attention["cases"][f"prefill, N = {keys}, knocked out: image -> query"]
        ours = rows["kernel"]
        others = ", ".join(
            f"{name} {rows[name]['against_kernel']:.1f} x" for name in ("SDPA, mask", "SDPA, causal", "FlexAttention")
        )
        said.append(
            f"prefill of N = {keys:,} with the image knocked out {ours['ms']:.1f} ms ({others}; in bfloat16"
            f" {rows['kernel bf16']['ms']:.1f} ms)"
        )
    ways, rates = scores["ways"], scores["gflops"]
    return [
        f"With matrix tiles, on two cores of an {attention['machine']['cpu']} (AMX): {'; '.join(said)};"
        f" scoring {ways['kernel, cached']['ms_per_head']:.1f} ms a head, {ways['kernel, cached']['times_faster']:.0f}"
        f" times faster than the direct way ({rates['kernel, amx']:.0f} GFLOP/s of float32 made of bfloat16 tiles)."
    ]


def linear(found: dict) -> list[str]:
    full = found["ms"]["float32"]
    pair = lambda row: f"{row['kernel']:.0f} against {row['torch']:.0f} ({row['torch'] / row['kernel']:.1f} x)"  # noqa: E731
    return [
        f"All linear layers of a language model of d = 1,024 and 16 layers ({found['float32 megabytes']:,.0f} MB in"
        " float32) for a few rows, ms, `skinny_linear`'s kernel against torch; how many rows it serves is measured on"
        " each machine:",
        "",
        "| rows | " + " | ".join(full) + " |",
        "| --- |" + " ---: |" * len(full),
        *(f"| {name} | " + " | ".join(map(pair, rows.values())) + " |" for name, rows in found["ms"].items()),
    ]


def paths(found: list[dict]) -> list[str]:
    """One row a processor that was measured."""
    lines = [
        "The path that each call takes is chosen by a calibration of the machine (`mllm-fast tune`). Of every op, type"
        " and size in `python benchmarks/paths.py`, how much longer the chosen path takes than the best one, at most;"
        " and prefill with the image knocked out in float32, as a share of the processor's multiply-adds:",
        "",
        "| processor | instruction sets | peak, GFLOP/s | chosen over best, at most | N = 640 | N = 2,048 |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for one in found:
        rows, machine = one["rows"], one["machine"]
        worst = max(row["chosen over best"] for row in rows.values())
        shares = [rows[f"attention of {n} rows over {n} keys, float32"]["share of the peak"] for n in (640, 2048)]
        lines.append(
            f"| {machine['cpu']}, {machine['threads']} threads | {machine['instruction sets']} |"
            f" {one['peak gflops']:.0f} | {worst:.2f} x | {shares[0]:.0%} | {shares[1]:.0%} |"
        )
    return lines


def knockouts(knockouts: dict) -> list[str]:
    long, steps = knockouts["generation"], knockouts["streaming"]
    plain, ours = long["ms"].values()
    each = steps["ms_a_token"]
    return [
        "32 tokens from a picture, a LLaVA of random weights (16 layers of d = 1,024, 576 image tokens), image -> query"
        f" and generated knocked out in all layers: {ours:,.0f} ms, transformers with SDPA and nothing knocked out"
        f" {plain:,.0f} ms. Streaming the embedded model: {each['stream']:.1f} ms a token,"
        f" {each['stream, explained']:.1f} with every token explained ({steps['explained_over_stream']:.2f} times).",
    ]
