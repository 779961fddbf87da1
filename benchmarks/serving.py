"""How many answers a second does the server give, are they right, and does its memory stay where it is?
`python benchmarks/serving.py [--seconds 180] [--out F]`: the real server as a process, the embedded model, loopback.

64 clients, each with a connection of its own, ask one question after another about 20 pictures (50 questions each, in
random order, the picture sent with every one), for three minutes. Gate: every answer is that of `Context.ask_many` in
this process, and nothing but 200 and 429 comes back. Then the contenders, each a server of its own under the same load
for a third of the time:

    contexts, together      as `mllm-fast serve` starts
    contexts, one by one    --max-batch 1
    whole pictures, together    --keep off
    whole pictures, one by one  --keep off --max-batch 1: a server without contexts that answers one request at a time

Memory is the server's resident set: the mean over the last minute against that over the first one after a warm-up of
ten seconds. Clients and server share the cores. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from harness import machine, write_result

import mllm_fast as mf
from mllm_fast.shapes.questions import TASKS, ask
from mllm_fast.shapes.scenes import generate_scene

WARM_UP = 10.0
WAYS = {
    "contexts, together": [],
    "contexts, one by one": ["--max-batch", "1"],
    "whole pictures, together": ["--keep", "off"],
    "whole pictures, one by one": ["--keep", "off", "--max-batch", "1"],
}
BASE = "whole pictures, one by one"


class Server:
    """`mllm-fast serve` as a process."""

    def __init__(self, *options: str):
        command = [sys.executable, "-m", "mllm_fast.cli", "serve", "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        told: list[str] = []
        for line in self.process.stderr:  # type: ignore[union-attr]
            told.append(line)
            if '"listening"' in line:
                break
        else:
            sys.exit(f"the server did not start ({' '.join(command)}):\n{''.join(told)}")
        self.port = json.loads(told[-1])["port"]
        self._drain = subprocess.Popen(["cat"], stdin=self.process.stderr, stdout=subprocess.DEVNULL)

    def resident(self) -> int:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self._drain.wait(10)
        return code


def draw(pictures: int, questions: int, seed: int) -> list[tuple[object, list[str]]]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(pictures):
        scene = generate_scene(rng)
        texts: list[str] = []
        while len(texts) < questions:
            one = ask(scene, rng, TASKS[len(texts) % len(TASKS)]) or ask(scene, rng, "exists")
            texts.append(one.text)
        found.append((scene.image, texts))
    return found


def request(image, question: str) -> bytes:
    """A chat completion as bytes, made before the clock runs."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    body = json.dumps({"model": "shapes", "messages": [{"role": "user", "content": parts}], "temperature": 0}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def client(port: int, requests: list, draw: random.Random, until: float, seen: list) -> None:
    """One after another until the time is over: (when it began, seconds, status, which, text, cached tokens)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while (began := time.perf_counter()) < until:
        which = draw.randrange(len(requests))
        writer.write(requests[which])
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head[9:12])
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        text, cached = None, 0
        if status == 200:
            text = body["choices"][0]["message"]["content"]
            cached = (body["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        seen.append((began, time.perf_counter() - began, status, which, text, cached))
        if status == 429:
            await asyncio.sleep(0.2)
    writer.close()


async def watch(server: Server, until: float, sizes: list) -> None:
    while time.perf_counter() < until:
        sizes.append((time.perf_counter(), server.resident()))
        await asyncio.sleep(1)


async def load(server: Server, requests: list, clients: int, seconds: float, seed: int) -> tuple[list, list]:
    seen: list = []
    sizes: list = []
    until = time.perf_counter() + seconds
    each = [client(server.port, requests, random.Random(seed + i), until, seen) for i in range(clients)]
    await asyncio.gather(*each, watch(server, until, sizes))
    return seen, sizes


def judge(seen: list, expected: list[str], name: str) -> dict[str, float]:
    """The gate, and the figures of one run."""
    statuses = {status for _, _, status, *_ in seen}
    if not statuses <= {200, 429}:
        raise SystemExit(f"{name}: statuses {statuses}")
    wrong = [(which, text) for _, _, status, which, text, _ in seen if status == 200 and text != expected[which]]
    if wrong:
        raise SystemExit(
            f"{name}: {len(wrong)} of {len(seen)} answers are wrong: {wrong[:3]}, not {expected[wrong[0][0]]}"
        )
    good = [one for one in seen if one[2] == 200]
    times = sorted(one[1] for one in good)
    span = max(one[0] + one[1] for one in seen) - min(one[0] for one in seen)
    return {
        "answers": len(good),
        "refused (429)": len(seen) - len(good),
        "wrong": 0,
        "answers a second": len(good) / span,
        "p50 ms": 1e3 * statistics.median(times),
        "p95 ms": 1e3 * times[int(0.95 * len(times))],
        "p99 ms": 1e3 * times[int(0.99 * len(times))],
        "from a context": sum(one[5] > 0 for one in good) / len(good),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180, help="of the longest run; the others take a third")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--pictures", type=int, default=20)
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--seed", type=int, default=4242)
    parser.add_argument("--out", type=Path, default=None, help="write the JSON line here too")
    args = parser.parse_args()
    vlm = mf.VLM.from_pretrained("shapes", device="cpu")
    drawn = draw(args.pictures, args.questions, args.seed)
    requests = [request(image, text) for image, texts in drawn for text in texts]
    by_context = [a.text for image, texts in drawn for a in vlm.compress(image).ask_many(texts, max_new_tokens=256)]
    whole = [vlm.generate(image, text, max_new_tokens=256).text for image, texts in drawn for text in texts]
    print(f"{len(requests)} requests of {np.mean([len(r) for r in requests]) / 1e3:.0f} kB;", end=" ")
    print(f"{np.mean([a != b for a, b in zip(by_context, whole, strict=True)]):.1%} of answers differ by the context")
    rows: dict[str, dict[str, float]] = {}
    memory: dict[str, float] = {}
    for name, options in WAYS.items():
        server = Server(*options)
        try:
            seconds = args.seconds if not options else args.seconds / 3
            seen, sizes = asyncio.run(load(server, requests, args.clients, seconds, args.seed))
        finally:
            code = server.stop()
        if code:
            raise SystemExit(f"{name}: the server ended with {code}")
        rows[name] = judge(seen, whole if "--keep" in options else by_context, name)
        print(f"{name:28s}" + "  ".join(f"{key} {value:.4g}" for key, value in rows[name].items()), flush=True)
        if not options:
            start, end, minute = sizes[0][0] + WARM_UP, sizes[-1][0], min(60.0, (seconds - WARM_UP) / 3)
            first = statistics.mean(size for at, size in sizes if start <= at < start + minute)
            last = statistics.mean(size for at, size in sizes if at >= end - minute)
            memory = {
                "first minute MiB": first / 2**20,
                "last minute MiB": last / 2**20,
                "last over first": last / first,
            }
            print("memory  " + "  ".join(f"{key} {value:.4g}" for key, value in memory.items()), flush=True)
    ratios = {name: row["answers a second"] / rows[BASE]["answers a second"] for name, row in rows.items()}
    print(
        "times the answers a second of whole pictures, one by one:", {name: round(r, 2) for name, r in ratios.items()}
    )
    result = {
        "benchmark": "serving",
        "machine": machine(),
        "clients": args.clients,
        "pictures": args.pictures,
        "questions": args.questions,
        "seconds": args.seconds,
        "servers": rows,
        "times": ratios,
        "memory": memory,
    }
    write_result(args.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
