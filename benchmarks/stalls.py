"""How long a stream waits for its next token while pictures arrive. `python benchmarks/stalls.py [--out F]`

The server's engine in this process, a LLaVA of random weights (d = 512, 8 layers, 576 image tokens). One client streams
an answer; meanwhile, another asks about a picture of its own every so often. The time between two tokens of the stream:

    quiet       nobody else asks
    in pieces   the pictures' prompts are read piece by piece between the decoding passes
    at once     a prompt is read whole between two passes

Gate: the stream says the same words in all three. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import queue
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from harness import machine, median, write_result
from models import random_llava
from PIL import Image

from mllm_fast.serving import reading
from mllm_fast.serving.engine import Engine
from mllm_fast.serving.requests import FailureEvent, FinishEvent, Generation, TokenEvent

TOKENS, EVERY = 300, 0.3  # of the stream; seconds between two pictures
QUESTION = "what is in the picture ?"


class Client:
    """A question about a picture, and when its tokens came."""

    def __init__(self, engine: Engine, seed: int, tokens: int):
        self.events: queue.Queue = queue.Queue()
        picture = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (96, 96, 3), dtype=np.uint8))
        inputs, (layout,), _ = engine.vlm.prompts.prepare([[picture]], [QUESTION])
        sink = lambda event: self.events.put((time.perf_counter(), event))  # noqa: E731
        engine.submit(Generation(sink, frozenset(), inputs=inputs, layout=layout, max_tokens=tokens))

    def result(self) -> tuple[list[int], list[float]]:
        said, at = [], []
        while not isinstance((came := self.events.get(timeout=300))[1], (FinishEvent, FailureEvent)):
            if isinstance(came[1], TokenEvent):
                said.append(came[1].token)
                at.append(came[0])
        return said, at


def streamed(vlm, arrive: bool) -> tuple[list[int], list[float]]:
    """Return the tokens of the stream and the seconds between them."""
    engine = Engine(vlm)
    engine.start()
    try:
        talking, others, began = Client(engine, 0, TOKENS), [], time.perf_counter()
        while arrive and talking.events.qsize() < TOKENS:
            time.sleep(0.02)
            if time.perf_counter() - began > EVERY * (len(others) + 1):
                others.append(Client(engine, len(others) + 1, 4))
        said, at = talking.result()
        return said, [b - a for a, b in itertools.pairwise(at)]
    finally:
        engine.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None, help="write the JSON line here too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    vlm = random_llava(512, 8, 8, 1408, (24, 24), 2048)
    in_pieces, whole = reading.Pace.read, lambda self, pieces, alone: in_pieces(self, pieces, True)
    ways = {"quiet": (False, in_pieces), "in pieces": (True, in_pieces), "at once": (True, whole)}
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    words = None
    for _ in range(args.rounds):
        for name, (arrive, read) in ways.items():
            reading.Pace.read = read  # type: ignore[method-assign]
            said, gaps = streamed(vlm, arrive)
            words = words or said
            if said != words:
                raise SystemExit(f"{name}: the stream says other words: no figures for a wrong answer")
            found[name].append((statistics.median(gaps), statistics.quantiles(gaps, n=20)[-1], max(gaps)))
    result: dict = {"benchmark": "stalls", "machine": machine(), "tokens": TOKENS, "ms": {}}
    quiet = median([one[1] for one in found["quiet"]])
    for name, runs in found.items():
        middle, p95, longest = (median([one[i] for one in runs]) * 1e3 for i in range(3))
        row = {"median": middle, "p95": p95, "longest": longest, "p95 over quiet": p95 / quiet / 1e3}
        result["ms"][name] = row
        print(f"{name:10s} " + "   ".join(f"{what} {figure:.2f}" for what, figure in row.items()), flush=True)
    print(json.dumps(result))
    write_result(args.out, result)


if __name__ == "__main__":
    main()
