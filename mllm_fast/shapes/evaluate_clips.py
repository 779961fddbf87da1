"""Measure the accuracy of the embedded video model on clips it never saw: `python -m mllm_fast.shapes.evaluate_clips`.

An answer counts only if it is right to the letter. Where its maps are highest is measured by `mllm-fast eval moments`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from ..core.video import Video
from ..models.loading import model_folder
from ..vlm import VLM
from .clip_questions import TASKS, ClipQuestion, ask
from .clips import FPS, Clip, generate_clip
from .evaluate import weights_digest

SEED = 31_730  # differs from the seeds of training (1) and of its held-out clips (1,000,000)
TABLE = Path(__file__).parent / "clip_accuracy.json"
_BATCH = 20


def accuracy(vlm: VLM, clips: int, seed: int) -> dict[str, float]:
    """Return the accuracy by task over `clips` questions a task, each about a clip of its own."""
    found = {}
    for number, task in enumerate(TASKS):
        rng = np.random.default_rng([seed, number])
        right: list[bool] = []
        while len(right) < clips:
            batch = [_asked(rng, task) for _ in range(min(_BATCH, clips - len(right)))]
            videos = [Video(clip.frames, frame_rate=FPS) for clip, _ in batch]
            answers = vlm.generate(videos, [question.text for _, question in batch], max_new_tokens=16)
            right += [said.text == question.answer for said, (_, question) in zip(answers, batch, strict=True)]
        found[task] = round(float(np.mean(right)), 4)
    return found


def _asked(rng: np.random.Generator, task: str) -> tuple[Clip, ClipQuestion]:
    while True:
        clip = generate_clip(rng)
        question = ask(clip, rng, task)
        if question is not None:
            return clip, question


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="clips", help="'clips', or a folder that train_clips.py wrote")
    parser.add_argument("--clips", type=int, default=1000, help="questions a task")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument(
        "--write", action="store_true", help=f"keep the table in {TABLE.name}, with the weights' digest"
    )
    args = parser.parse_args()
    found = accuracy(VLM.from_pretrained(args.model, device="cpu"), args.clips, args.seed)
    table: dict[str, Any] = {"clips": args.clips, "seed": args.seed, "accuracy": found}
    table["weights_sha256"] = weights_digest(model_folder(args.model))
    print(json.dumps(table))
    if args.write:
        TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
