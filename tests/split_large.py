"""A program that explains an answer with no more memory than it is allowed, in one process or as one of several.

    split_large.py MODEL MIB [alone]

MIB is what the process may allocate beside what the libraries took. Its last line is JSON: the head scores of one
token, or the error.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch
from split_cases import IMAGE, QUESTION
from transformers import LlavaForConditionalGeneration, LlavaProcessor  # noqa: F401 loaded before the limit counts

import mllm_fast as mf
from mllm_fast.vlm import VLM  # noqa: F401


def main(model: str, mib: str, alone: str = "") -> None:
    torch.set_num_threads(1)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    limit = (int(status["VmData"].split()[0]) << 10) + (int(mib) << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        vlm = mf.VLM.from_pretrained(model, device="cpu", dtype="float32", tp=None if alone else "auto")
        print(json.dumps({"scores": vlm.explain(IMAGE, QUESTION, "red").head_scores.tolist()}), flush=True)
    except (mf.InputError, RuntimeError, MemoryError) as error:
        print(json.dumps({"error": str(error)}), flush=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main(*sys.argv[1:])
