"""Does the server stay right, whole and small for an hour? `python benchmarks/soak.py [--seconds 3600] [--out F]`:
the real server as a process, the embedded model, a store, loopback.

The store has the server's default of 10 GiB, which an hour does not fill; a smaller one forgets the contexts that were
not asked about for longest, as it should.

24 clients of two keys send all kinds of requests: questions about known and about ever new pictures, whole and
streamed, from contexts and from whole pictures, through both of OpenAI's interfaces; contexts that are made, looked up
and forgotten; explanations; streams that are left in their middle. Two thirds of the time the server runs on. In the
last third it is stopped or killed and started again every 20 seconds, on the same port and store.

Gates: every answer is that of `VLM.compress` and `Context.ask`, or of `VLM.generate`, in this process; a context whose
making was answered is there after each restart (two seconds after its making, when the server is killed); nothing but
200, 201, 404 of what was deleted, 429 and 503 comes back. Memory and descriptors: the means over the last and the first
sixth of the time that the server runs on, after a warm-up. The last line is JSON.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from harness import machine, write_result
from PIL import Image

import mllm_fast as mf
from mllm_fast.shapes.scenes import generate_scene

KEYS = ("sk-soak-first-0123456789", "sk-soak-second-0123456789")
QUESTIONS = ("What color is the star?", "How many objects are there?", "Describe the image.", "Is there a ring?")
CLIENTS, KNOWN, WARM_UP, EVERY, WRITTEN = 24, 40, 30.0, 20.0, 2.0
CHECKED = 1500  # answers that are compared with the library's at the end
KINDS = {
    "known": 34,
    "new": 14,
    "stream": 14,
    "left": 8,
    "whole": 6,
    "responses": 6,
    "make": 5,
    "context": 6,
    "delete": 2,
    "list": 2,
    "explain": 3,
}


class Server:
    """`mllm-fast serve` on one port, started again and again."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        (folder / "keys").write_text("\n".join(KEYS))
        self._command = [sys.executable, "-m", "mllm_fast.cli", "serve", "--port", str(self.port), "--quiet"]
        self._command += ["--api-keys", str(folder / "keys"), "--store", str(folder / "store"), "--memory", "64"]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command)
        for _ in range(600):
            try:
                if httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        raise RuntimeError("the server does not start")

    def end(self, kind: int) -> None:
        self.process.send_signal(kind)
        self.process.wait(60)

    def resident(self) -> int:
        with open(f"/proc/{self.process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


def picture(seed: int) -> Image.Image:
    return generate_scene(np.random.default_rng([7, seed])).image


def url_of(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


class Run:
    """What all clients share."""

    def __init__(self, server: Server):
        self.server = server
        self.ended, self.restarting = threading.Event(), threading.Event()
        self.guard = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.answers: dict[tuple[int, str, str], str] = {}  # (picture, question, way) -> answer
        self.wrong: list[str] = []
        self.contexts: dict[str, tuple[str, int, float]] = {}  # id -> key, picture, when it was made
        self.urls = {i: url_of(picture(i)) for i in range(KNOWN)}
        self.next = KNOWN

    def new(self) -> int:
        with self.guard:
            self.next += 1
            return self.next

    def say(self, seed: int, question: str, way: str, answer: str) -> None:
        with self.guard:
            self.counts["answers"] += 1
            if self.answers.setdefault((seed, question, way), answer) != answer:
                self.wrong.append(f"{seed} {question} {way}: {answer!r} after {self.answers[seed, question, way]!r}")

    def bad(self, what: str) -> None:
        with self.guard:
            self.wrong.append(what)


class Client(threading.Thread):
    """A client: one request after another, each of a random kind."""

    def __init__(self, run: Run, number: int):
        super().__init__(daemon=True)
        self._run, self._key, self._rng = run, KEYS[number % 2], random.Random(number)

    def run(self) -> None:
        run = self._run
        with httpx.Client(
            base_url=run.server.url, headers={"Authorization": f"Bearer {self._key}"}, timeout=120
        ) as http:
            while not run.ended.is_set():
                kind = self._rng.choices(list(KINDS), list(KINDS.values()))[0]
                try:
                    getattr(self, f"do_{kind}")(http)
                    run.counts[kind] += 1
                except (httpx.HTTPError, json.JSONDecodeError) as error:
                    if not run.restarting.is_set():
                        run.bad(f"{kind}: {error!r}")
                    run.counts["broken off"] += 1
                    time.sleep(0.2)

    def _fine(self, reply: httpx.Response, also: tuple[int, ...] = ()) -> bool:
        if reply.status_code in (200, 201):
            return True
        self._run.counts[f"status {reply.status_code}"] += 1
        if reply.status_code not in (429, 503, *also):
            self._run.bad(f"{reply.status_code} {reply.text[:200]}")
        time.sleep(0.05)
        return False

    def _body(self, seed: int, question: str, **more: Any) -> dict[str, Any]:
        url = self._run.urls.get(seed) or url_of(picture(seed))
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        return {"messages": [{"role": "user", "content": content}], **more}

    def _ask(self, http: httpx.Client, seed: int, way: str = "context", **more: Any) -> None:
        question = self._rng.choice(QUESTIONS)
        reply = http.post("/v1/chat/completions", json=self._body(seed, question, **more))
        if self._fine(reply):
            self._run.say(seed, question, way, reply.json()["choices"][0]["message"]["content"])

    def do_known(self, http: httpx.Client) -> None:
        self._ask(http, self._rng.randrange(KNOWN))

    def do_new(self, http: httpx.Client) -> None:
        self._ask(http, self._run.new())

    def do_whole(self, http: httpx.Client) -> None:
        self._ask(http, self._rng.randrange(KNOWN), "whole", keep="off")

    def do_stream(self, http: httpx.Client, leave: bool = False) -> None:
        seed, question = self._rng.randrange(KNOWN), self._rng.choice(QUESTIONS)
        body = self._body(seed, question, stream=True)
        with http.stream("POST", "/v1/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                reply.read()
                self._fine(reply)
                return
            text, whole = "", False
            for line in reply.iter_lines():
                if line == "data: [DONE]":
                    whole = True
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        if event["error"]["type"] != "server_error":
                            self._run.bad(str(event))
                        return
                    text += "".join(one["delta"].get("content") or "" for one in event["choices"])
                    if leave and text:
                        return
            if whole:
                self._run.say(seed, question, "context", text)

    def do_left(self, http: httpx.Client) -> None:
        with httpx.Client(base_url=http.base_url, headers=http.headers, timeout=120) as own:
            self.do_stream(own, leave=True)

    def do_responses(self, http: httpx.Client) -> None:
        seed, question = self._rng.randrange(KNOWN), self._rng.choice(QUESTIONS)
        content = [
            {"type": "input_image", "image_url": self._run.urls[seed]},
            {"type": "input_text", "text": question},
        ]
        reply = http.post("/v1/responses", json={"input": [{"role": "user", "content": content}]})
        if self._fine(reply):
            self._run.say(seed, question, "context", reply.json()["output"][0]["content"][0]["text"])

    def do_make(self, http: httpx.Client) -> None:
        seed = self._run.new()
        reply = http.post("/v1/contexts", json={"images": [{"url": url_of(picture(seed))}]})
        if self._fine(reply):
            with self._run.guard:
                self._run.contexts[reply.json()["id"]] = self._key, seed, time.monotonic()

    def _mine(self) -> tuple[str, int] | None:
        with self._run.guard:
            mine = [(one, seed) for one, (key, seed, _) in self._run.contexts.items() if key == self._key]
        return self._rng.choice(mine) if mine else None

    def do_context(self, http: httpx.Client) -> None:
        if (found := self._mine()) is None:
            return
        identity, seed = found
        question = self._rng.choice(QUESTIONS)
        body = {"messages": [{"role": "user", "content": question}], "context": identity}
        reply = http.post("/v1/chat/completions", json=body)
        if reply.status_code == 404:  # deleted meanwhile, or lost
            time.sleep(0.5)  # who deletes it forgets it before, and may be answered later
            with self._run.guard:
                if identity in self._run.contexts and not self._run.restarting.is_set():
                    self._run.wrong.append(f"context {identity} is gone")
        elif self._fine(reply):
            self._run.say(seed, question, "context", reply.json()["choices"][0]["message"]["content"])

    def do_delete(self, http: httpx.Client) -> None:
        if (found := self._mine()) is None:
            return
        with self._run.guard:
            if self._run.contexts.pop(found[0], None) is None:
                return
        self._fine(http.delete(f"/v1/contexts/{found[0]}"), (404,))

    def do_list(self, http: httpx.Client) -> None:
        self._fine(http.get("/v1/contexts"))

    def do_explain(self, http: httpx.Client) -> None:
        body = self._body(self._rng.randrange(KNOWN), self._rng.choice(QUESTIONS[:2]))
        body["format"] = self._rng.choice(["json", "png", "html", "safetensors"])
        self._fine(http.post("/v1/explanations", json=body))


def watch(run: Run, seconds: float) -> tuple[list[int], list[int]]:
    """Return memory and descriptors of the server, once a second."""
    memory, files = [], []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        memory.append(run.server.resident())
        files.append(run.server.descriptors())
        time.sleep(1)
    return memory, files


def restart(run: Run, number: int) -> int:
    """Stop or kill the server, start it again, and return how many contexts were lost."""
    kind = signal.SIGKILL if number % 2 else signal.SIGTERM
    run.restarting.set()
    with run.guard:
        made = {one: key for one, (key, _, when) in run.contexts.items() if time.monotonic() - when > WRITTEN}
    run.server.end(kind)
    run.server.start()
    lost = 0
    with httpx.Client(base_url=run.server.url, timeout=120) as http:
        for identity, key in random.Random(number).sample(sorted(made.items()), min(50, len(made))):
            while True:
                reply = http.get(f"/v1/contexts/{identity}", headers={"Authorization": f"Bearer {key}"})
                if reply.status_code not in (429, 503):
                    break
                time.sleep(0.1)
            with run.guard:
                there = identity in run.contexts  # not deleted meanwhile
            if reply.status_code != 200 and there:
                lost += 1
    time.sleep(1)  # connections that broke are told of
    run.restarting.clear()
    return lost


def check(run: Run) -> tuple[int, list[str]]:
    """Compare answers with the library's."""
    vlm = mf.VLM.from_pretrained("shapes", device="cpu")
    chosen = random.Random(0).sample(sorted(run.answers), min(CHECKED, len(run.answers)))
    contexts: dict[int, Any] = {}
    wrong = []
    for seed, question, way in chosen:
        if way == "whole":
            found = vlm.generate(picture(seed), question, max_new_tokens=256).text
        else:
            if seed not in contexts:
                contexts[seed] = vlm.compress(picture(seed), 0.05)
            found = contexts[seed].ask(question, max_new_tokens=256).text
        if found != run.answers[seed, question, way]:
            wrong.append(f"{seed} {question} {way}: {run.answers[seed, question, way]!r}, the library {found!r}")
    return len(chosen), wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Server(Path(folder)))
        clients = [Client(run, i) for i in range(CLIENTS)]
        for one in clients:
            one.start()
        steady = arguments.seconds * 2 / 3
        watch(run, min(WARM_UP, steady / 4))
        memory, files = watch(run, steady)
        lost, restarts = 0, 0
        until = time.monotonic() + arguments.seconds - steady
        while time.monotonic() < until:
            time.sleep(min(EVERY, max(0.0, until - time.monotonic())))
            lost += restart(run, restarts)
            restarts += 1
        run.ended.set()
        for one in clients:
            one.join(150)
        code = 0
        run.server.end(signal.SIGTERM)
        code = run.server.process.returncode
    checked, differ = check(run)
    sixth = max(1, len(memory) // 4)
    means = [statistics.mean(part) for part in (memory[:sixth], memory[-sixth:], files[:sixth], files[-sixth:])]
    result = {
        "benchmark": "soak",
        "machine": machine(),
        "seconds": arguments.seconds,
        "requests": sum(run.counts[kind] for kind in KINDS),
        "kinds": dict(run.counts),
        "wrong answers": len(differ) + sum("is gone" not in one for one in run.wrong),
        "contexts that were gone": sum("is gone" in one for one in run.wrong),
        "compared with the library": checked,
        "different answers of one question": len(run.answers),
        "restarts": restarts,
        "lost contexts": lost,
        "exit code": code,
        "memory, MiB": [round(one / 2**20, 1) for one in means[:2]],
        "memory, ratio": round(means[1] / means[0], 4),
        "descriptors": [round(one, 1) for one in means[2:]],
    }
    for line in [*run.wrong[:10], *differ[:10]]:
        print(line)
    write_result(arguments.out, result)
    print(json.dumps(result))
    if run.wrong or differ or lost or code:
        sys.exit(1)


if __name__ == "__main__":
    main()
