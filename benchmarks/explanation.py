"""What does an explanation cost? `python benchmarks/explanation.py`: time of one token of the embedded
model against generating it from the picture, and memory of a long answer over many image tokens.

Explaining a token: the scores of all heads, the position scores of the ten best, the heat map. The gate: the
explained word is the generated one, and the head scores agree with the float64 reference. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from harness import machine, median, peak_bytes, write_result
from models import random_llava

import mllm_fast as mf
from mllm_fast.shapes.questions import ask
from mllm_fast.shapes.scenes import generate_scene


def explain_one(vlm: mf.VLM, rounds: int) -> dict:
    """Seconds of generating one token from the picture (`generate`, picture already decoded), and of explaining
    it from that pass's cache, in turn, over scenes that change every round."""
    rng = np.random.default_rng(3)
    generating, recording_cost, explaining = [], [], []
    for i in range(rounds + 3):
        scene, question = generate_scene(rng), None
        while question is None:
            question = ask(scene, rng, "color")
            scene = scene if question else generate_scene(rng)
        start = time.perf_counter()
        said = vlm.generate(scene.image, question.text, max_new_tokens=1)
        middle = time.perf_counter()
        ex = vlm.explain(scene.image, question.text, max_new_tokens=1)
        recorded = time.perf_counter()
        ex.heatmap(0)
        end = time.perf_counter()
        if ex.text != said.text:
            raise SystemExit(f"explained {ex.text!r}, generated {said.text!r}: no figures for a wrong explanation")
        if i >= 3:
            generating.append(middle - start)
            recording_cost.append(recorded - middle)
            explaining.append(end - recorded)
    whole = [(r - g) + e for r, g, e in zip(recording_cost, generating, explaining, strict=True)]
    return {
        "generate_ms": median(generating) * 1e3,
        "record_and_generate_ms": median(recording_cost) * 1e3,
        "explain_ms": median(explaining) * 1e3,
        "explain_over_generate": median(explaining) / median(generating),
        "explain_and_recording_over_generate": median(whole) / median(generating),
    }


def long_answer(vlm: mf.VLM, tokens: int) -> dict:
    """Peak memory of explaining an answer of `tokens` tokens, beside one array of tokens x tokens."""
    picture = generate_scene(np.random.default_rng(0)).image
    answer = " ".join(["red circle blue square green star"] * tokens)
    forced = " ".join(answer.split()[:tokens])
    length = 0

    def run() -> None:
        nonlocal length
        ex = vlm.explain(picture, "describe the image.", forced)
        for token in range(len(ex.tokens)):
            ex.heatmap(token)
        length = len(ex.input_ids)

    def plain() -> None:
        vlm.generate(picture, "describe the image.", max_new_tokens=1)

    peak, floor = peak_bytes(run), peak_bytes(plain)
    return {
        "sequence": length,
        "peak_megabytes": peak / 1e6,
        "generate_peak_megabytes": floor / 1e6,
        "one_square_array_megabytes": 4 * length**2 / 1e6,
        "one_layers_attention_megabytes": 4 * vlm.text.num_heads * length**2 / 1e6,
        "largest_array_elements": largest_array(run),
        "square_elements": length**2,
    }


def largest_array(run) -> int:
    """Elements of the largest tensor that any operation inside `run` makes."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Watch(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    self.most = max(self.most, leaf.untyped_storage().nbytes() // leaf.element_size())
            return out

    with Watch() as watch:
        run()
    return watch.most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--out", type=Path, default=None, help="write the JSON line here too")
    args = parser.parse_args()
    torch.set_num_threads(2)
    result: dict = {"benchmark": "explanation", "machine": machine()}
    result["one token"] = one = explain_one(mf.VLM.from_pretrained("shapes", device="cpu"), args.rounds)
    print(
        f"generate one token from the picture {one['generate_ms']:.2f} ms; with its rows recorded"
        f" {one['record_and_generate_ms']:.2f} ms"
    )
    print(
        f"explain it {one['explain_ms']:.2f} ms: {one['explain_over_generate']:.2f} of generating it; with the cost of"
        f" recording {one['explain_and_recording_over_generate']:.2f}"
    )
    wide = random_llava(128, layers=4, heads=4, intermediate=128, grid=(32, 64), window=8192, ends=True)
    result["long answer"] = long = long_answer(wide, args.tokens)
    print(
        f"{args.tokens} tokens over {long['sequence']} positions: peak {long['peak_megabytes']:.1f} MB (generating one"
        f" token {long['generate_peak_megabytes']:.1f}); an array of tokens x tokens"
        f" {long['one_square_array_megabytes']:.1f} MB;"
        f" largest array made {long['largest_array_elements']:,} elements, tokens squared {long['square_elements']:,}"
    )
    print(json.dumps(result))
    write_result(args.out, result)


if __name__ == "__main__":
    main()
