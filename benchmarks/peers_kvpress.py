"""kvpress on the work of benchmarks/peers.py, in an environment that has it; `peers.py --kvpress PYTHON` starts it.

`python benchmarks/peers_kvpress.py FOLDER`: its own pipeline takes no pictures, so this does what the pipeline does, on
a LLaVA: one pass over picture and prompt under a press that keeps 5 % of the keys and values, then 32 questions of 8
words, each decoded greedily to 8 tokens over these keys, which are cut back to where they were after each. kvpress
0.5.5 takes transformers before 5.3. The last line is JSON: the seconds of the first question, and questions a second.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from typing import Any

import numpy as np
import torch
from kvpress import KnormPress
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

WORDS, QUESTION_WORDS, ANSWER, BURST, RATIO = 32000, 8, 8, 32, 0.95


class Asked:
    """A picture whose keys were pressed, asked one question after another."""

    def __init__(self, model: Any, processor: Any, seed: int):
        self.model = model
        pixels = np.random.default_rng(seed).integers(0, 256, (336, 336, 3), dtype=np.uint8)
        inputs = processor(images=Image.fromarray(pixels), text="USER: <image>", return_tensors="pt")
        self.encode = lambda text: processor.tokenizer(text, return_tensors="pt").input_ids
        self.cache, self.length = DynamicCache(), inputs["input_ids"].shape[1]
        with torch.inference_mode(), KnormPress(compression_ratio=RATIO)(model):
            model(**inputs, past_key_values=self.cache, logits_to_keep=1)
        self.kept = self.cache.get_seq_length()

    @torch.inference_mode()
    def ask(self, question: str) -> list[int]:
        ids, said, at = self.encode(f"{question} ASSISTANT:"), [], self.length
        for _ in range(ANSWER):
            positions = torch.arange(at, at + ids.shape[1])[None]
            given = {"position_ids": positions, "past_key_values": self.cache, "logits_to_keep": 1}
            logits = self.model(input_ids=ids, **given).logits
            at += ids.shape[1]
            ids = logits[:, -1:].argmax(-1)
            said.append(int(ids))
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, : self.kept], layer.values[:, :, : self.kept]
        return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model = AutoModelForImageTextToText.from_pretrained(args.folder, dtype=getattr(torch, args.dtype)).eval()
    processor = AutoProcessor.from_pretrained(args.folder)
    first, burst = [], []
    for number in range(args.rounds + 1):  # the first round warms up
        draw, began = random.Random(number), time.perf_counter()
        asked = Asked(model, processor, number)
        answers = [asked.ask("w1 w2 w3")]
        first.append(time.perf_counter() - began)
        questions = [" ".join(f"w{draw.randrange(WORDS)}" for _ in range(QUESTION_WORDS)) for _ in range(BURST)]
        began = time.perf_counter()
        answers += [asked.ask(one) for one in questions]
        burst.append(BURST / (time.perf_counter() - began))
        if {len(one) for one in answers} != {ANSWER} or asked.kept > asked.length * 0.06:
            raise SystemExit("answers of another length, or nothing was pressed: no figures")
    print(json.dumps({"first s": statistics.median(first[1:]), "burst/s": statistics.median(burst[1:])}))


if __name__ == "__main__":
    main()
