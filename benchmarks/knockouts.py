"""What do knockouts and streamed explanations cost end to end? `python benchmarks/knockouts.py`.

Generation: 32 tokens from a picture with a LLaVA of random weights (16 layers of d = 1,024, 16 heads, 576 image
tokens), image -> query and image -> generated knocked out in all layers, against transformers' own generation with SDPA
and nothing knocked out. The gate: the same tokens as under eager attention with the additive mask.

Streaming: the embedded model describes pictures token by token; every token is explained as it appears (all heads,
the ten best heads' positions, the heat map), against the same stream without explanations, and against `generate`.
The gate: the tokens are those of `generate`.

Contenders run in turn; figures are medians; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from harness import in_turn, machine, median, write_result
from models import random_llava

import mllm_fast as mf
from mllm_fast.shapes.scenes import generate_scene

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import knocked

TOKENS, LAYERS = 32, 16
RULES = [knocked.Rule("image", target, "all", tuple(range(LAYERS))) for target in ("query", "generated")]


def generation(rounds: int) -> dict:
    vlm = random_llava(1024, layers=LAYERS, heads=16, intermediate=2752, grid=(24, 24), window=2048)
    picture, question = generate_scene(np.random.default_rng(0)).image, "describe the image."

    def plain() -> mf.Answer:
        return vlm.generate(picture, question, max_new_tokens=TOKENS)

    def knocked_out() -> mf.Answer:
        return vlm.generate(picture, question, knockout=knocked.knockouts(RULES), max_new_tokens=TOKENS)

    ours = knocked_out()
    with knocked.eager(vlm, RULES, [ours.layout]):
        expected = plain()
    if ours.token_ids != expected.token_ids or len(ours.token_ids) != TOKENS:
        raise SystemExit(f"knocked out {ours.token_ids}, eager {expected.token_ids}: no figures for a wrong answer")
    times = in_turn({"SDPA, nothing knocked out": plain, "image knocked out": knocked_out}, rounds)
    ms = {name: median(seconds) * 1e3 for name, seconds in times.items()}
    ratio = median([a / b for a, b in zip(*reversed(times.values()), strict=True)])
    return {"sequence": len(ours.input_ids), "ms": ms, "knocked_out_over_plain": ratio}


def streaming(rounds: int) -> dict:
    vlm = mf.VLM.from_pretrained("shapes", device="cpu")
    rng = np.random.default_rng(5)
    ways: dict[str, list[float]] = {"generate": [], "stream": [], "stream, explained": []}
    for i in range(rounds + 2):
        picture, question = generate_scene(rng).image, "describe the image."
        said = vlm.generate(picture, question)
        for name in ways:
            start = time.perf_counter()
            if name == "generate":
                ids = vlm.generate(picture, question).token_ids
            else:
                ids = []
                for step in vlm.stream(picture, question, explain=name == "stream, explained"):
                    ids.append(step.token_id)
                    if name == "stream, explained":
                        step.heatmap()
            seconds = time.perf_counter() - start
            if ids != said.token_ids:
                raise SystemExit(f"{name} gave {ids}, generate {said.token_ids}: no figures for a wrong stream")
            if i >= 2:
                ways[name].append(seconds / (len(ids) + 1))  # the end of the answer is a token too
    ratio = median([a / b for a, b in zip(ways["stream, explained"], ways["stream"], strict=True)])
    against = median([a / b for a, b in zip(ways["stream, explained"], ways["generate"], strict=True)])
    ms = {name: median(seconds) * 1e3 for name, seconds in ways.items()}
    return {"ms_a_token": ms, "explained_over_stream": ratio, "explained_over_generate": against}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None, help="write the JSON line here too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result: dict = {"benchmark": "knockouts", "machine": machine(), "rounds": args.rounds}
    result["generation"] = found = generation(args.rounds)
    for name, ms in found["ms"].items():
        print(f"{TOKENS} tokens, {name}: {ms:.0f} ms")
    print(f"image knocked out over plain SDPA: {found['knocked_out_over_plain']:.2f}")
    result["streaming"] = found = streaming(4 * args.rounds)
    for name, ms in found["ms_a_token"].items():
        print(f"a token, {name}: {ms:.2f} ms")
    print(
        f"explained over the plain stream: {found['explained_over_stream']:.2f};"
        f" over generate: {found['explained_over_generate']:.2f}"
    )
    print(json.dumps(result))
    write_result(args.out, result)


if __name__ == "__main__":
    main()
