"""The figures of docs/benchmarks.md and README, made from the result files: `python benchmarks/table.py` prints the
page's, `python benchmarks/table.py headlines` README's table. A test holds both to the files."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import table_kernels as kernels
import table_video as video
from table_gpu import gpu

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_APART = ("gpu-", "paths_")  # results that name their machine where they are shown


def table() -> str:
    scores, explanation, fidelity, attention, knockouts = map(
        _result, ("scores", "explanation", "fidelity", "attention", "knockouts")
    )
    accuracy = json.loads((ROOT / "mllm_fast" / "shapes" / "accuracy.json").read_text())
    parts = [
        kernels.speed(scores),
        kernels.attention(attention),
        kernels.tiles(_result("attention_amx"), _result("scores_amx")),
        *(gpu(_result(path.stem)) for path in sorted(RESULTS.glob("gpu-*.json"))),
        kernels.linear(_result("linear")),
        kernels.paths([_result(path.stem) for path in sorted(RESULTS.glob("paths_*.json"))]),
        kernels.knockouts(knockouts),
    ]
    # figures that were not measured are left out, not made up
    parts += [
        make(_result(name)) for name, make in (("reprompt", _reprompt), ("reprompt_quality", _quality)) if _has(name)
    ]
    parts += [_cost(explanation)]
    parts += [_streaming(_result("streaming"))] if _has("streaming") else []
    parts += [_maps(fidelity)]
    parts += [_methods(_result("maps"))] if _has("maps") else []
    parts += [_joint(_result("joint"), _result("gradient_alignment"))] if _has("joint") else []
    parts += [serving(_result("serving"))] if _has("serving") else []
    parts += [_peers(_result("peers"), _result("peers_bfloat16"))] if _has("peers") else []
    parts += [_heads(_result("peers_heads"))] if _has("peers_heads") else []
    parts += [_stalls(_result("stalls"))] if _has("stalls") else []
    parts += [video.memory(_result("video"))] if _has("video") else []
    parts += [video.moments(_result("moments"))] if _has("moments") else []
    parts += [_accuracy(accuracy), _machines()]
    return "\n\n".join("\n".join(part) for part in parts)


def _has(name: str) -> bool:
    return (RESULTS / f"{name}.json").exists()


def _result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _reprompt(reprompt: dict) -> list[str]:
    asked, files = reprompt["questions"], reprompt["files"]
    peak = asked["peak megabytes"]
    lines = [
        f"32 questions of 12 tokens about one picture, 8 new tokens each, by a LLaVA of random weights (16 layers of"
        f" d = 1,024; a prefix of 576 image and 64 text tokens), from a context of {asked['kept']} of {asked['prefix']}"
        " tokens:",
        "",
        "| way | questions a second | `ask_many` is faster by |",
        "| --- | ---: | ---: |",
    ]
    names = {
        "generate from the picture": "transformers, `generate` from the picture",
        "uncompressed cache, copied": "transformers, the uncompressed cache copied for each question",
        "uncompressed cache, 32 copies": "transformers, one batch over 32 copies of the uncompressed cache",
        "compressed cache, 32 copies": "plain torch, one batch over 32 copies of the context",
        "ask_many": "`ask_many`, one copy of the context",
    }
    for name, label in names.items():
        faster = "" if name == "ask_many" else f"{asked['times faster'][name]:.1f} x"
        lines.append(f"| {label} | {32 / asked['seconds'][name]:.1f} | {faster} |")
    ms, size = files["ms"], files["megabytes"]
    lines += [
        "",
        f"The context holds {asked['context megabytes']:.1f} MB, the uncompressed cache"
        f" {asked['uncompressed megabytes']:.1f}; keys and values at their peak: {peak['ask_many']:.0f} MB, 32 copies"
        f" {peak['32 copies']:,.0f} MB. Saving takes {ms['save']:.1f} ms and loading {ms['load']:.1f}"
        f" ({files['over safetensors']:.2f} times safetensors alone); as int8 {size['int8']:.1f} MB, errors"
        f" {files['int8 errors']['keys']:.1%} of keys and {files['int8 errors']['values']:.1%} of values. Loading a"
        f" context and asking it one question takes {ms['load, ask']:.0f} ms, `generate` from the picture"
        f" {ms['picture, generate']:.0f} ms.",
    ]
    return lines


def _quality(quality: dict) -> list[str]:
    found, shares = quality["accuracy"], (1, 2, 5, 10, 20, 50)
    percent = lambda label: f"{100 * found[label]['accuracy']:.1f}"  # noqa: E731
    lines = [
        f"Right answers of the embedded model (%), {quality['scenes']} held-out scenes with 8 questions each, from what"
        f" is kept of the image tokens; everything kept: {percent('full')}, the prompt's tokens alone:"
        f" {percent('query alone')}, all image tokens without the prompt's: {percent('100 % alone')} (standard errors"
        f" up to {100 * max(row['error'] for row in found.values()):.1f}):",
        "",
        "| kept | " + " | ".join(f"{share} %" for share in shares) + " |",
        "| --- |" + " ---: |" * len(shares),
    ]
    words = {
        "generated": "attended by the reply",
        "query": "attended by the prompt",
        "norm": "small keys",
        "random": "random",
    }
    for lead, end, parts in (("query + ", "", "prompt and tokens"), ("", " alone", "tokens alone")):
        for score, word in words.items():
            row = [percent(f"{lead}{share} %{end}, {score}") for share in shares]
            lines.append(f"| {parts}, {word} | {' | '.join(row)} |")
    rows = [row for row in quality["ordering"] if row["score"] == "generated"]
    near = [f"{r['K']} % against {r['against']} ({r['points']:+.1f} points)" for r in rows if r["standard errors"] < 2]
    said = (
        "For K of 2 to 20 %, the prompt and what the reply attended to lie above the prompt alone, K alone and the"
        " prompt with random tokens by two standard errors or more, paired by scene"
    )
    lines += ["", f"{said}, but for {'; '.join(near)}." if near else f"{said}."]
    return [*lines, "", "![Right answers over the share of image tokens kept](reprompt.png)"]


def _cost(explanation: dict) -> list[str]:
    one, long = explanation["one token"], explanation["long answer"]
    return [
        f"Explaining one word of the embedded model (all heads, the ten best heads' positions, the map) takes"
        f" {one['explain_ms']:.1f} ms, {one['explain_over_generate']:.2f} of the {one['generate_ms']:.1f} ms that"
        f" generating it from the picture takes. Explaining 30 words over a sequence of {long['sequence']:,} tokens,"
        f" the largest array made holds {long['largest_array_elements']:,} numbers; tokens squared would be"
        f" {long['square_elements']:,}.",
    ]


def _peers(full: dict, half: dict) -> list[str]:
    """What was asked of vLLM and of the server in one run each."""
    rows = {"float32": full["servers"], "bfloat16": half["servers"]}
    lines = [
        "Beside vLLM for the CPU with prefix caching and others, on the same two cores, over HTTP (kvpress in its own"
        " process): a LLaVA of random weights (d = 1,024, 16 layers, 576 image tokens), 8 tokens an answer; the first"
        " question about a picture, then 32 questions about it at once, alone and beside a busy process; and the"
        " embedded model under 64 clients:",
        "",
        "| server | first question, s | 32 at once, answers/s | beside a busy process | embedded, answers/s |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for dtype, servers in rows.items():
        for name, row in servers.items():
            small, beside = row.get("embedded, 64 clients, answers/s"), row.get("neighbour/s")
            last, busy = ("" if one is None else f"{one:.{digits}f}" for one, digits in ((small, 0), (beside, 1)))
            lines.append(f"| {name}, {dtype} | {row['first s']:.2f} | {row['burst/s']:.1f} | {busy} | {last} |")
    return lines


def _heads(found: dict) -> list[str]:
    """One token explained beside nnsight."""
    lines = [
        "One token of a tiny LLaVA of random weights (d = 128, 6 layers, 144 image tokens) from its picture and"
        " question, explained: transformers' pass alone, nnsight with the scores in plain torch, and `VLM.explain`, in"
        " ms:",
        "",
        "| scores | the pass alone | nnsight | ours | nnsight over ours |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in found["ms"].items():
        figures = " | ".join(f"{row[one]:.1f}" for one in ("the pass alone", "nnsight", "ours", "nnsight over ours"))
        lines.append(f"| {name} | {figures} |")
    return lines


def _stalls(found: dict) -> list[str]:
    """A stream of the server while pictures arrive."""
    lines = [
        f"The time between two of {found['tokens']} streamed tokens, while another client asks about a new picture"
        " every 0.3 s: the server's engine, a LLaVA of random weights (d = 512, 8 layers, 576 image tokens), in ms:",
        "",
        "| pictures | median | 95 of 100 | against quiet | longest |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in found["ms"].items():
        figures = f"{row['median']:.1f} | {row['p95']:.1f} | {row['p95 over quiet']:.2f} x | {row['longest']:.0f}"
        lines.append(f"| {name} | {figures} |")
    return lines


def _streaming(found: dict) -> list[str]:
    rows = found["tokens"]
    lines = [
        f"A token of the embedded model that appears while the model talks, on {found['machine']['threads']} thread:"
        " transformers' own modules in a bare loop, `VLM.stream` with text and log-probability, and the same explained"
        " with every token's map. Two rows are with the layers run by transformers and all scores in plain torch:",
        "",
        "| way | ms a token | against the bare loop |",
        "| --- | ---: | ---: |",
    ]
    lines += [f"| {name} | {row['ms']:.2f} | {row['times the bare loop']:.2f} x |" for name, row in rows.items()]
    return lines


def _maps(fidelity: dict) -> list[str]:
    lines = [
        "Maps of the embedded model on 500 held-out scenes a task, among those answered right: does the highest patch"
        " touch the asked object; what share of the positive mass lies on it; how many answers change when the 5 %"
        " highest patches are blanked (random patches:"
        f" {fidelity['both, frozen']['random flips']:.1%}).",
        "",
        "| map | touches, colour / shape | mass inside, colour / shape | answers changed, colour / shape |",
        "| --- | ---: | ---: | ---: |",
    ]
    for norm, methods in (("frozen", ("ten best heads", "best head", "mean attention")), ("own", ("ten best heads",))):
        color, shape = fidelity[f"color, {norm}"], fidelity[f"shape, {norm}"]
        for method in methods:
            c, s = color[method], shape[method]
            label = method if method == "mean attention" else f"{method}, {norm} norm"
            lines.append(
                f"| {label} | {c['hit']:.3f} / {s['hit']:.3f} | {c['inside']:.2f} / {s['inside']:.2f} |"
                f" {c['flips']:.2f} / {s['flips']:.2f} |"
            )
    return lines


def _methods(maps: dict) -> list[str]:
    names = {
        "logprob": "log-probability increase (ours)",
        "attention": "mean attention",
        "rollout": "attention rollout (2020)",
        "relevancy": "gradient-weighted attention (Chefer et al. 2021; LVLM-Interpret)",
        "tam": "token activation map (2025)",
        "gradient-input": "gradient x input",
        "exhaustive": "each patch knocked out in turn",
        "random": "random",
    }
    lines = [
        f"Every way of drawing a map, on the same {maps['words']} words for objects in {maps['scenes']} descriptions"
        " (`mllm-fast eval fidelity`): does the peak lie at the object; the word's mean probability with the map's"
        " highest patches knocked out (deletion, lower is better) and with only those left (insertion, higher is"
        " better); rank correlation with knocking each patch out in turn, which tells little where patches stand in for"
        " each other; time, with nothing kept of maps before, and tensors of one map:",
        "",
        "| method of `heatmap` | peak at object | deletion | insertion | rank | ms | MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for method, label in names.items():
        one = maps["methods"][method]
        both = lambda name, digits, one=one: f"{one[name][0]:.{digits}f} ± {one[name][1]:.{digits}f}"  # noqa: E731
        rank = round(one["rank"][0], 2) + 0.0  # no minus before zero
        lines.append(
            f"| {label} | {one['hit'][0]:.1%} | {both('deletion', 3)} | {both('insertion', 3)} | {rank:.2f} |"
            f" {1e3 * one['seconds']:.1f} | {one['megabytes']:.2f} |"
        )
    chart = "![The word's probability while patches are knocked out, by eight ways of drawing a map](maps.png)"
    return [*lines, "", chart]


def _joint(joint: dict, speed: dict) -> list[str]:
    own, ours = joint["joint"]["accuracy"].values()
    boxes, point, told = joint["joint"]["detector"], joint["pointing"]["least"], joint["simulatability"]
    seen, bias = joint["hallucination"], joint["bias"]["effects"]
    hard = ", ".join(f"{kind} {one['strength']:g}" for kind, one in seen["hard"].items())
    became, total = joint["bias"]["became"]["pgd"], seen["together"]
    percent = lambda value: f"{100 * value:.1f} %"  # noqa: E731
    heavy, kept = point["0"]["both"], point["0.02"]["both"]
    rows = (
        (
            f"detector: recall of {boxes['things']:,} things at a precision of 90 %; average precision",
            f"{percent(boxes['recall'])}; {boxes['average_precision']:.3f}",
        ),
        (
            "right answers through W, colour / shape; the language model's own eyes",
            f"{percent(ours['color'])} / {percent(ours['shape'])}; {percent(own['color'])} / {percent(own['shape'])}",
        ),
        (
            f"heaviest box of gradient alignment has its middle in the asked object's box, {heavy['count']:,} right"
            " answers; on the object's own pixels (a ring has a hole)",
            f"{percent(heavy['box'])}; {percent(heavy['object'])}",
        ),
        ("the same, of boxes with a score of 0.02 or more", f"{percent(kept['box'])}; {percent(kept['object'])}"),
        (
            f"two words' maps told apart by where their things are ({told['pairs']:,} pairs): gradient alignment;"
            " log-probability; mean attention; random",
            "; ".join(percent(told[name]) for name in ("gradient-alignment", "logprob", "attention", "random")),
        ),
        (
            f"is it there? where the model says yes to a tenth or more of what is not ({hard}): AUROC of the largest"
            " box's score; of the model's P(yes)",
            f"{total['score']:.3f}; {total['own']:.3f}",
        ),
        (
            "red swapped for blue in E: colour answers that change; that become blue; shape answers that change",
            f"{percent(bias['color']['pgd']['mean'])}; {percent(became)}; {percent(bias['shape']['pgd']['mean'])}",
        ),
        (
            "random changes of the same norm: colour; shape answers that change",
            f"{percent(bias['color']['random']['mean'])}; {percent(bias['shape']['random']['mean'])}",
        ),
    )
    seconds, peak = speed["seconds"], speed["peak_mib"]["ours"]
    return [
        f"The embedded joint model, on {joint['scenes']:,} scenes that no training drew"
        " (`python benchmarks/joint.py`; 200 scenes in 13 versions for hallucinations, 500 for the swap):",
        "",
        "| measured | |",
        "| --- | ---: |",
        *(f"| {label} | {value} |" for label, value in rows),
        "",
        "Gradient alignment of one word with one query at OWL-ViT base's sizes (577 tokens of 768):"
        f" {seconds['ours']:.2f} s and {peak:.0f} MiB; one backward pass a box {seconds['a box']:.0f} s"
        f" ({speed['times_faster_than_a_box']:.0f} times), the released way, one a box and coordinate,"
        f" {seconds['released']:.0f} s ({speed['times_faster_than_released']:.0f} times), both from a part of their"
        " passes;"
        f" in float64 the norms agree to {speed['errors']['norms']:.0e}.",
        "",
        "![The detector's largest score and the model's P(yes), of what is there and of what is not]"
        "(hallucinations.png)",
    ]


def serving(measured: dict) -> list[str]:
    """Of the server under load; docs/serving.md holds it too."""
    rows, memory = measured["servers"], measured["memory"]
    return [
        f"The server under load (`mllm-fast serve`, the embedded model, two cores shared with the clients):"
        f" {measured['clients']} clients over loopback, {measured['pictures']} pictures, {measured['questions']}"
        f" questions each, {measured['seconds']:.0f} s (the others {measured['seconds'] / 3:.0f}); every answer was"
        " compared with the library's own, none was wrong, and no request failed:",
        "",
        "| server | answers a second | | p50 | p95 | answered from a context |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {name} | {row['answers a second']:.0f} | {measured['times'][name]:.1f} x | {row['p50 ms']:.0f} ms"
            f" | {row['p95 ms']:.0f} ms | {row['from a context']:.1%} |"
            for name, row in rows.items()
        ),
        "",
        f"Its memory: {memory['first minute MiB']:.0f} MiB in the first minute,"
        f" {memory['last minute MiB']:.0f} in the last.",
    ]


_GEOMETRIES = {  # layers, key heads, head size; tokens of a picture, of text about it; gigabytes of weights in bfloat16
    "LLaVA-1.5-7B": (32, 32, 128, 576, 20, 14.1),
    "InternVL3-8B, six tiles and a thumbnail": (28, 4, 128, 1792, 40, 15.9),
    "Qwen2.5-VL-7B, 1,036 x 1,036 pixels": (28, 4, 128, 1369, 30, 16.6),
}


def sizes(reprompt: dict, keep: float = 0.05, card: float = 80.0, spare: float = 8.0) -> list[str]:
    """Of contexts: those that were measured, and those of well-known models by the same arithmetic."""
    lines = [
        "| model | a context that keeps 5 % | the uncompressed cache | contexts on a card of 80 GB |",
        "| --- | ---: | ---: | ---: |",
        "| measured: a LLaVA of d = 1,024 and 16 layers in float32, 576 image tokens |"
        f" {reprompt['questions']['context megabytes']:.1f} MB |"
        f" {reprompt['questions']['uncompressed megabytes']:.1f} MB | |",
    ]
    for name, (layers, heads, size, image, text, weights) in _GEOMETRIES.items():
        token = 2 * layers * heads * size * 2 / 1e6
        context, whole = (math.ceil(keep * image) + text) * token, (image + text) * token
        count = (card - weights - spare) * 1e3 / context
        lines.append(f"| {name}, bfloat16 | {context:.1f} MB | {whole:.0f} MB | {count:,.0f} |")
    return [
        *lines,
        "",
        f"Contexts on a card: beside the weights and {spare:.0f} GB for everything else, by arithmetic.",
    ]


def _accuracy(accuracy: dict) -> list[str]:
    tasks = list(accuracy["own"])
    rows = {"the generator's scenes": accuracy["own"], "another renderer's": accuracy["second"]}
    return [
        f"Accuracy of the embedded model, {accuracy['scenes']:,} questions a task it never saw, right to the letter:",
        "",
        "| scenes | " + " | ".join(tasks) + " |",
        "| --- |" + " ---: |" * len(tasks),
        *(f"| {name} | " + " | ".join(f"{row[task]:.3f}" for task in tasks) + " |" for name, row in rows.items()),
        "",
        "Its training puts the reading of the picture into the middle layers in part by construction (see"
        " `mllm_fast/shapes/train.py`); its maps show that the method works, not how large models see.",
    ]


def _machines() -> list[str]:
    """What was measured where."""
    where: dict[str, list[str]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        m = json.loads(path.read_text()).get("machine")
        if m is not None and not path.stem.endswith(("_amx", "_bfloat16")) and not path.stem.startswith(_APART):
            where.setdefault(f"two cores of an {m['cpu']}, torch {m['torch']}", []).append(f"`{path.stem}.py`")
    most = max(where, key=lambda name: len(where[name]))
    rest = "".join(f" ({', '.join(files)}: {name})" for name, files in where.items() if name != most)
    return [
        f"Measured on {most}{rest}, but for the GPU's. To measure yours: `python benchmarks/` and"
        f" {', '.join(sorted(file for files in where.values() for file in files))}."
    ]


def headlines() -> str:
    """README's ten figures."""
    scores, knockouts, reprompt, maps = map(_result, ("scores", "knockouts", "reprompt", "maps"))
    chip = _result("gpu-nvidia-h200")
    quality, served, joint = _result("reprompt_quality")["accuracy"], _result("serving")["servers"], _result("joint")
    prefill = {r["contender"]: r for r in chip["prefill"] if (r["mask"], r["positions"]) == ("image->query", 2048)}
    ours, masked = prefill["ours"], prefill["SDPA, mask"]
    ms, stream = knockouts["generation"]["ms"], knockouts["streaming"]["ms_a_token"]
    asked, chance = reprompt["questions"], maps["methods"]["random"]
    logprob = maps["methods"]["logprob"]
    rows = [
        ("scoring a head's 600 positions, 7B sizes, CPU", f"{scores['ways']['kernel, cached']['ms_per_head']:.0f} ms",
         f"{scores['ways']['direct']['ms_per_head']:.0f} ms, the direct way in torch"),
        ("attention, image knocked out, 2,048 tokens, H200", f"{1e3 * ours['ms']:.0f} µs",
         f"{1e3 * masked['ms']:.0f} µs, SDPA with a mask"),
        ("32 tokens with the image knocked out, CPU", f"{ms['image knocked out'] / 1e3:.1f} s",
         f"{ms['SDPA, nothing knocked out'] / 1e3:.1f} s, transformers without a knockout"),
        ("a token of the embedded model, explained", f"{stream['stream, explained']:.1f} ms",
         f"{stream['stream']:.1f} ms, without explanation"),
        ("32 questions about one image, CPU", f"{32 / asked['seconds']['ask_many']:.1f} a second",
         f"{32 / asked['seconds']['generate from the picture']:.1f} a second, `generate`"),
        ("memory of that image's context", f"{asked['context megabytes']:.0f} MB",
         f"{asked['uncompressed megabytes']:.0f} MB, the whole KV cache"),
        ("right answers with 5 % of the image tokens", f"{100 * quality['query + 5 %, generated']['accuracy']:.1f} %",
         f"{100 * quality['full']['accuracy']:.1f} % with all of them"),
        ("a word's probability without its highest patches", f"{logprob['deletion'][0]:.2f}",
         f"{chance['deletion'][0]:.2f} without random ones"),
        ("is it there? AUROC of the detector's best box", f"{joint['hallucination']['together']['score']:.3f}",
         f"{joint['hallucination']['together']['own']:.3f}, the model's own yes"),
        ("answers of a server with contexts, two cores",
         f"{served['contexts, together']['answers a second']:.0f} a second",
         f"{served['whole pictures, one by one']['answers a second']:.0f} a second, whole pictures one by one"),
    ]  # fmt: skip
    lines = ["| measured | mllm-fast | beside it |", "| --- | ---: | --- |"]
    return "\n".join([*lines, *(f"| {what} | {ours} | {other} |" for what, ours, other in rows)])


if __name__ == "__main__":
    print(headlines() if sys.argv[1:] == ["headlines"] else table())
