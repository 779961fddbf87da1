"""A program that runs once a rank, and works until it is ended.

    split_endless.py MODEL WHAT FOLDER

WHAT is "stream" or "compress". The first rank prints a line before each round; contexts are saved in the folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from split_cases import IMAGE, QUESTION

import mllm_fast as mf
from mllm_fast.models import tensor_parallel


def main(model: str, what: str, folder: str) -> None:
    torch.set_num_threads(1)
    tensor_parallel.TIMEOUT = 5.0
    vlm = mf.VLM.from_pretrained(model, device="cpu", tp="auto")
    while True:
        if not dist.get_rank():
            print("round", flush=True)
        if what == "stream":
            for step in vlm.stream(IMAGE, QUESTION, explain=True, max_new_tokens=64):
                step.heatmap()
        else:
            vlm.compress(IMAGE, keep=0.4, max_new_tokens=8).save(Path(folder) / "image.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
