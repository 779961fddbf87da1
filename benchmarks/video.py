"""What explaining a word about a video costs in memory: `python benchmarks/video.py`.

A LLaVA of random weights (4 layers of d = 256, 4 heads) reads 4, 8 and 16 frames of 28 x 37 = 1,036 tokens each and
says one word. Three calls: the word is generated; it is generated and explained, with the map of every moment; and the
same sequence is run by transformers with `output_attentions`, on its eager attention, as a caller would who wants the
attention of that word. Each runs in a process of its own, whose address space may grow by 8 GiB from where it begins;
what does not fit is refused by the allocator, and named with the bytes that it asked for.

The gate: the attention of the word that the explanation gives is that of transformers, for 4 frames.

Figures are peaks of resident memory above that before the call, and of the tensors alive at once; the growth from 8 to
16 frames over that from 4 to 8 says how the cost grows (2 for linear, 4 for quadratic). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from harness import machine, peak_bytes, write_result
from models import random_llava

import mllm_fast as mf
from mllm_fast.evaluation.memory import peak_tensor_bytes

GRID, FRAMES = (28, 37), (4, 8, 16)
CALLS = ("generate", "explain", "output_attentions")
ROOM = 8 << 30
QUESTION = "what moves"


class Problem:
    """The model, a video of some frames, and the calls."""

    def __init__(self, frames: int):
        self.vlm = random_llava(256, 4, 4, 688, GRID, 32768)
        rng = np.random.default_rng(0)
        size = GRID[0] * 4, GRID[1] * 4
        pictures = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for _ in range(frames)]
        (self.video,) = self.vlm.prompts.load(mf.Video(pictures, frame_rate=2))

    def generate(self) -> None:
        self.vlm.generate(self.video, QUESTION, max_new_tokens=1)

    def explain(self) -> mf.Explanation:
        ex = self.vlm.explain(self.video, QUESTION, max_new_tokens=1)
        ex.video().maps(0)
        return ex

    def output_attentions(self) -> torch.Tensor:
        inputs, _, _ = self.vlm.prompts.prepare([[self.video]], [QUESTION])
        self.vlm.model.set_attn_implementation("eager")
        with torch.inference_mode():
            found = self.vlm.model(**inputs, output_attentions=True, use_cache=True)
        return torch.stack([one[0, :, -1] for one in found.attentions])


def measured(frames: int, call: str) -> dict:
    """Run a call in this process: the peaks, or the reason why it was refused."""
    torch.set_num_threads(2)
    problem = Problem(1)
    getattr(problem, call)()  # libraries allocate once
    problem = Problem(frames)
    _, (layout,), _ = problem.vlm.prompts.prepare([[problem.video]], [QUESTION])
    run: Callable[[], object] = getattr(problem, call)
    found: dict = {"frames": frames, "call": call, "tokens": layout.length}
    mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ROOM, mapped + ROOM))
    try:
        found["resident"] = peak_bytes(run)
        found["tensors"] = peak_tensor_bytes(run)
    except (RuntimeError, MemoryError) as error:
        found["refused"] = " ".join(str(error).split())[:200]
    return found


def gate() -> float:
    """Return the largest difference between the attention of an explanation and that of transformers."""
    problem = Problem(4)
    own = problem.explain().attention(0)
    theirs = problem.output_attentions()
    return float((own[..., : theirs.shape[-1]] - theirs).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="also write the result to this file")
    parser.add_argument("--one", nargs=2, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(int(args.one[0]), args.one[1])))
        return
    error = gate()
    print(f"gate: attention of the word differs by at most {error:.1e}")
    if error > 1e-5:
        sys.exit("the gate is not passed")
    rows = []
    for frames in FRAMES:
        for call in CALLS:
            command = [sys.executable, __file__, "--one", str(frames), call]
            # freed blocks go back to the system at once, so that what is resident is what is in use
            own = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=own)
            if done.returncode != 0:
                sys.exit(done.stderr)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            row = rows[-1]
            peaks = f"refused: {row['refused']}" if "refused" in row else ""
            peaks = (
                peaks or f"{row['resident'] / 2**20:8.0f} MiB resident, {row['tensors'] / 2**20:8.0f} MiB of tensors"
            )
            print(f"{frames:3d} frames, {row['tokens']:6d} tokens, {call:18s} {peaks}", flush=True)
    by = {(row["frames"], row["call"]): row for row in rows}
    over = {n: by[n, "explain"]["resident"] / by[n, "generate"]["resident"] for n in FRAMES}
    tensors = {n: by[n, "explain"]["tensors"] / by[n, "generate"]["tensors"] for n in FRAMES}
    growth = [
        (by[16, call]["tensors"] - by[8, call]["tensors"]) / (by[8, call]["tensors"] - by[4, call]["tensors"])
        for call in ("generate", "explain")
    ]
    print(f"explaining over generating: resident {over}, tensors {tensors}")
    print(f"growth from 8 to 16 frames over that from 4 to 8: generate {growth[0]:.2f}, explain {growth[1]:.2f}")
    result = {
        "benchmark": "video",
        "machine": machine(),
        "gate": error,
        "rows": rows,
        "explain_over_generate": {"resident": over, "tensors": tensors},
        "growth": {"generate": growth[0], "explain": growth[1]},
    }
    write_result(args.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
