"""What does a token cost that appears while the model talks, plain and explained with its map?
`python benchmarks/streaming.py [--threads 1] [--out F]`: the embedded model, a description of 64 tokens.

    bare loop       transformers' own modules: `language_model`, then `lm_head`, then argmax without the end; no text
    stream          `VLM.stream`: the token's text, its log-probability, `generate`'s processors and stopping criteria
    explained       the same with `explain=True`, and every token's `heatmap()`
    by the model    both with backend="torch", whose layers are run by transformers' own forward

Gate: all say the same tokens; scores and maps are those of `VLM.explain`, and against float64 the head scores of a
streamed token are as near as those of plain torch. Contenders take turns, a description each. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from harness import machine, median, write_result

import mllm_fast as mf
from mllm_fast.runtime.direct_decoder import why_not_direct
from mllm_fast.runtime.kv_cache import CACHE
from mllm_fast.shapes.scenes import generate_scene

PROMPT, TOKENS = "Describe the image.", 64
NEAR = 2e-5  # of float32 scores against those of another path, in nats
BASE = "bare loop"


def bare(vlm: mf.VLM, image: object) -> Iterator[int]:
    """The tokens of a loop over transformers' own modules."""
    inputs, _ = vlm.prepare(image, PROMPT)  # type: ignore[arg-type]
    inner, head, ends = vlm.model.model.language_model, vlm.model.lm_head, list(vlm.settings().end_ids)
    with torch.inference_mode():
        out = vlm.model(**inputs, use_cache=True)
        cache, length = out[CACHE], inputs["input_ids"].shape[1]
        logits = out.logits[:, -1]
        for i in range(TOKENS):
            logits[:, ends] = -torch.inf  # as min_new_tokens has it
            token = logits.argmax(-1)
            yield int(token)
            found = inner(
                input_ids=token[None], position_ids=torch.tensor([[length + i]]), use_cache=True, **{CACHE: cache}
            )
            logits = head(found.last_hidden_state)[:, -1]


def streamed(vlm: mf.VLM, image: object, explain: bool) -> Iterator[int]:
    for step in vlm.stream(image, PROMPT, explain=explain, max_new_tokens=TOKENS, min_new_tokens=TOKENS):  # type: ignore
        if explain:
            step.heatmap()
        yield step.token_id


def gate(vlm: mf.VLM, image: object) -> dict[str, float]:
    """Check tokens, scores and maps, and return the largest differences."""
    said = list(bare(vlm, image))
    by_stream = list(streamed(vlm, image, False))
    same = len(by_stream)
    if by_stream != said[:same] or same < TOKENS // 2:
        raise SystemExit(f"the stream says {by_stream}, the bare loop {said}")
    explained = vlm.explain(image, PROMPT, max_new_tokens=TOKENS, min_new_tokens=TOKENS)  # type: ignore[arg-type]
    scores = maps = 0.0
    steps = vlm.stream(image, PROMPT, explain=True, max_new_tokens=TOKENS, min_new_tokens=TOKENS)  # type: ignore
    for index, step in enumerate(steps):
        scores = max(scores, float((step.head_scores - explained.head_scores[index]).abs().max()))
        heads = [(layer, head) for layer, head, _ in explained.top_heads(index)]
        maps = max(maps, float((step.heatmap(heads=heads) - explained.heatmap(index, heads=heads)).abs().max()))
    if max(scores, maps / 10) > NEAR:
        raise SystemExit(f"scores differ by {scores:.2g}, maps by {maps:.2g}")
    return {"tokens": same, "scores": scores, "maps": maps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, default=None, help="write the JSON line here too")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(args.threads)
    vlm, by_model = (mf.VLM.from_pretrained("shapes", device="cpu", backend=one) for one in ("auto", "torch"))
    print(f"layers run directly: {why_not_direct(vlm.text) or 'yes'}")
    image = generate_scene(np.random.default_rng(0)).image
    gates = gate(vlm, image)
    print(
        f"{gates['tokens']} tokens; scores within {gates['scores']:.1e}, maps within {gates['maps']:.1e} of explain's"
    )
    contenders: dict[str, Callable[[], Iterator[int]]] = {
        BASE: lambda: bare(vlm, image),
        "stream": lambda: streamed(vlm, image, False),
        "explained": lambda: streamed(vlm, image, True),
        "stream, by the model": lambda: streamed(by_model, image, False),
        "explained, by the model": lambda: streamed(by_model, image, True),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(args.rounds + 1):
        for name, start in contenders.items():
            at = time.perf_counter()
            for index, _ in enumerate(start()):
                now = time.perf_counter()
                if i and index:  # the first token takes the prompt's pass
                    times[name].append(now - at)
                at = now
    base = median(times[BASE])
    figures = {
        name: {"ms": 1e3 * median(all_), "times the bare loop": median(all_) / base} for name, all_ in times.items()
    }
    for name, row in figures.items():
        print(f"{name:24s} {row['ms']:6.3f} ms a token   {row['times the bare loop']:.2f} times the bare loop")
    result = {"benchmark": "streaming", "machine": machine(), "gate": gates, "tokens": figures}
    write_result(args.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
