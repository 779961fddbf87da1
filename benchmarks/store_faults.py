"""Is a store right after anything? `python benchmarks/store_faults.py`: eight processes fill one folder with contexts
of the embedded model, and one of them is killed (SIGKILL) at each of 50 random moments and replaced.

Afterwards every file that is there must be readable and hold, bit for bit, what a fresh computation gives; no lock may
be left; no unfinished file once the store has been used again; and asking for every context must not block. Exit code 1
if not. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from harness import machine, write_result

import mllm_fast as mf
from mllm_fast.context.file_format import read
from mllm_fast.context.store import ContextStore
from mllm_fast.core.files import TEMPORARY
from mllm_fast.shapes.scenes import generate_scene

FORK = multiprocessing.get_context("fork")
SETTINGS = {"keep": 0.2, "score": "query"}


def work(vlm: mf.VLM, pictures: list, folder: str, budget: int, seed: int) -> None:
    """Ask for random contexts until killed; nothing is remembered, so that files are read and written all the time."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    store = ContextStore(folder, memory_bytes=0, disk_bytes=budget)
    while True:
        store.get(vlm, draw.choice(pictures), **SETTINGS)


def same(a: mf.Context, b: mf.Context) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("keys", "values", "positions", "input_ids"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--pictures", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="write the JSON line here too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    vlm = mf.VLM.from_pretrained("shapes", device="cpu")
    rng, draw = np.random.default_rng(args.seed), random.Random(args.seed)
    pictures = [generate_scene(rng).image for _ in range(args.pictures)]
    expected = [vlm.compress(picture, **SETTINGS) for picture in pictures]
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.safetensors"
        expected[0].save(probe)
        size = probe.stat().st_size
        probe.unlink()
        where, budget = str(Path(folder) / "store"), size * args.pictures // 2  # files are dropped all the time too

        def start(seed: int):
            worker = FORK.Process(target=work, args=(vlm, pictures, where, budget, seed))
            worker.start()
            return worker

        workers = [start(i) for i in range(args.processes)]
        left = 0
        for kill in range(args.kills):
            time.sleep(draw.uniform(0.05, 0.6))
            victim = draw.randrange(len(workers))
            if not workers[victim].is_alive():
                raise SystemExit("a process stopped by itself")
            os.kill(workers[victim].pid, signal.SIGKILL)
            workers[victim].join()
            left = max(left, len(list(Path(where).glob(f"??/{TEMPORARY}*"))))
            workers[victim] = start(args.processes + kill)
        for worker in workers:
            worker.kill()
            worker.join()

        names = {ContextStore(where).key(vlm, [p], {**defaults(), **SETTINGS}): i for i, p in enumerate(pictures)}
        files = list(Path(where).glob("??/*.safetensors"))
        wrong = []
        for path in files:
            read(path)  # raises if it is damaged
            if not same(mf.Context.load(path, vlm), expected[names[path.stem]]):
                wrong.append(path.stem)
        store = ContextStore(where, memory_bytes=0, disk_bytes=budget)
        begin = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a damaged entry would warn
            for picture, context in zip(pictures, expected, strict=True):
                if not same(store.get(vlm, picture, **SETTINGS), context):
                    wrong.append("asked again")
        seconds = time.monotonic() - begin
        unfinished = len(list(Path(where).glob(f"??/{TEMPORARY}*")))
    print(
        f"{args.kills} kills of {args.processes} processes: {len(files)} files, {len(wrong)} wrong; at most {left}"
        f" unfinished files at a time, {unfinished} after the store was used again; all {args.pictures} contexts were"
        f" got in {seconds:.1f} s ({store.hits} from files)"
    )
    result = {
        "benchmark": "store_faults",
        "machine": machine(),
        "kills": args.kills,
        "files": len(files),
        "wrong": len(wrong),
        "unfinished at a time": left,
        "unfinished": unfinished,
        "hits": store.hits,
    }
    print(json.dumps(result))
    write_result(args.out, result)
    raise SystemExit(1 if wrong or unfinished or not files else 0)


def defaults() -> dict:
    return {"prompt": "Describe the image.", "parts": "query+image"}


if __name__ == "__main__":
    main()
