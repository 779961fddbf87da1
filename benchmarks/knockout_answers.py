"""Are answers under knockouts those of the definition? `python benchmarks/knockout_answers.py`: greedy answers of the
embedded model over generated scenes, token by token against eager attention with the additive mask of arXiv 2411.17491,
equation 3 (`tests/knocked.py`).

Each scene has one question, of all kinds in turn. Knockouts: image -> generated, image -> query, and both; in all
layers, from each layer on, and in all but the middle half.

A difference is printed with the gap between the two best logits where the answers part, in roundings of the largest
logit: below about 10 the two are a tie that float32 cannot decide. Exit code 1 on any difference, ties included. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from harness import machine, write_result

import mllm_fast as mf
from mllm_fast.shapes.questions import TASKS, ask
from mllm_fast.shapes.scenes import generate_scene

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import knocked

BATCH = 50


def draw(count: int, seed: int) -> tuple[list, list[str]]:
    """Pictures and prompts."""
    rng = np.random.default_rng(seed)
    pictures: list = []
    prompts: list[str] = []
    while len(prompts) < count:
        scene = generate_scene(rng)
        question = ask(scene, rng, TASKS[len(prompts) % len(TASKS)])
        if question is not None:
            pictures.append(scene.image)
            prompts.append(question.text)
    return pictures, prompts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=20_260)
    parser.add_argument("--out", type=Path, default=None, help="write the JSON line here too")
    args = parser.parse_args()
    torch.set_num_threads(2)
    vlm = mf.VLM.from_pretrained("shapes", device="cpu")
    pictures, prompts = draw(args.scenes, args.seed)
    plain = [said.token_ids for part in _batches(pictures, prompts) for said in vlm.generate(*part)]
    rows, begun = {}, time.perf_counter()
    for rule in knocked.image_rules(len(vlm.text.layers)):
        found: list = []
        said: list = []
        for part in _batches(pictures, prompts):
            answers, differ = knocked.differences(vlm, *part, rule)
            said += [answer.token_ids for answer in answers]
            found += differ
        changed = sum(a != b for a, b in zip(said, plain, strict=True))
        gaps = [one.roundings for one in found]
        rows[str(rule.knockout)] = {"answers": len(said), "changed": changed, "different": len(found), "gaps": gaps}
        print(
            f"{rule.knockout}: changes {changed} of {len(said)} answers, {len(found)} differ from the definition's",
            flush=True,
        )
        for one in found:
            print(f"  {one}")
    different = sum(row["different"] for row in rows.values())
    result = {
        "benchmark": "knockout_answers",
        "machine": machine(),
        "seed": args.seed,
        "answers": len(prompts) * len(rows),
        "different": different,
        "seconds": round(time.perf_counter() - begun, 1),
        "rules": rows,
    }
    print(json.dumps(result))
    write_result(args.out, result)
    return 1 if different else 0


def _batches(pictures: list, prompts: list[str]) -> list[tuple[list, list[str]]]:
    return [(pictures[i : i + BATCH], prompts[i : i + BATCH]) for i in range(0, len(prompts), BATCH)]


if __name__ == "__main__":
    sys.exit(main())
