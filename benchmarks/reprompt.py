"""Many questions about one picture: how fast are they answered, in how much memory? `python benchmarks/reprompt.py`.

A LLaVA of random weights (16 layers of d = 1,024, 16 heads), a prefix of 576 image tokens and 64 of text, 32 questions
of 12 tokens, 8 new tokens each. `Context.ask_many` at keep = 5 % against transformers:
(a) `generate` from the picture, question by question;
(b) the uncompressed cache of the prefix reused, copied for each question, as transformers' documentation shows;
(c) the same in one batch, over 32 copies of the uncompressed cache.
And 32 copies of the compressed cache in plain torch, for what the shared prefix and the kernels add.

The gate: with everything kept, `ask_many` gives the tokens of (b) and of (c); at 5 %, those of the copies in torch. The
cache's peak is the most bytes of keys and values alive at once, counted tensor by tensor.

Then files: a context saved and loaded against the same tensors through safetensors alone; and a context loaded and
asked one question against reading the picture again, with transformers' `generate` or with `compress` and `ask`.
Contenders run in turn; figures are medians; the last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from harness import in_turn, machine, median, write_result
from models import random_llava
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

import mllm_fast as mf
from mllm_fast.runtime.kv_cache import CACHE, cache_of
from mllm_fast.shapes.scenes import generate_scene

QUESTIONS, LENGTH, NEW = 32, 12, 8
KEEP = 0.05
TEXT = 64  # tokens of the prefix that are not of the picture
WORDS = "red green blue yellow purple orange white black circle square triangle star cross ring".split()  # noqa: SIM905
NO_KEYS = {"do_sample": False, "max_new_tokens": NEW}


class Problem:
    """The model, its picture, the prompt and the questions."""

    def __init__(self, device: str, dtype: torch.dtype, hidden: int, layers: int, grid: int):
        self.vlm = random_llava(hidden, layers, hidden // 64, hidden * 43 // 16, (grid, grid), 2048)
        self.vlm.model.to(device=device, dtype=dtype)
        self.picture = generate_scene(np.random.default_rng(0)).image
        _, (layout,), _ = self.prepare("describe the image")
        room = TEXT - (layout.length - len(layout.positions("image")))
        self.prompt = "describe the image" + " image" * room
        self.inputs, (self.layout,), _ = self.prepare(self.prompt)
        self.questions = [self.question(i) for i in range(QUESTIONS)]
        self.ids = [self.vlm.prompts.turn_ids(self.prompt, 1, q) for q in self.questions]
        assert self.layout.length - len(self.layout.positions("image")) == TEXT
        assert {len(ids) for ids in self.ids} == {LENGTH}

    def prepare(self, prompt: str):
        return self.vlm.prompts.prepare([self.vlm.prompts.load(self.picture)], [prompt])

    def question(self, i: int) -> str:
        around = len(self.vlm.prompts.turn_ids("describe", 1, "red")) - 1
        return " ".join(WORDS[(i * 5 + j * (1 + i // 14)) % len(WORDS)] for j in range(LENGTH - around))

    def prefix_cache(self) -> DynamicCache:
        with torch.inference_mode():
            return cache_of(self.vlm.model(**self.inputs, use_cache=True, logits_to_keep=1))

    def whole(self, ids: list[int]) -> torch.Tensor:
        prefix = self.inputs["input_ids"]
        return torch.cat([prefix, torch.tensor([ids], device=prefix.device)], 1)


def bytes_of(cache: DynamicCache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def from_the_picture(p: Problem, count: int = QUESTIONS) -> list[list[int]]:
    """(a)"""
    said = []
    for ids in p.ids[:count]:
        whole = p.whole(ids)
        inputs = {**p.inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
        with torch.inference_mode():
            out = p.vlm.model.generate(**inputs, **NO_KEYS)
        said.append(out[0, whole.shape[1] :].tolist())
    return said


def copied(p: Problem, prefix: DynamicCache) -> list[list[int]]:
    """(b)"""
    said = []
    for ids in p.ids:
        whole = p.whole(ids)
        with torch.inference_mode():
            out = p.vlm.model.generate(
                input_ids=whole, attention_mask=torch.ones_like(whole), **{CACHE: copy.deepcopy(prefix)}, **NO_KEYS
            )
        said.append(out[0, whole.shape[1] :].tolist())
    return said


def batched(p: Problem, prefix: DynamicCache, peak: list[int]) -> list[list[int]]:
    """(c)"""
    cache = copy.deepcopy(prefix)
    cache.batch_repeat_interleave(QUESTIONS)
    whole = torch.cat([p.whole(ids) for ids in p.ids])
    with torch.inference_mode():
        out = p.vlm.model.generate(input_ids=whole, attention_mask=torch.ones_like(whole), **{CACHE: cache}, **NO_KEYS)
    peak[:] = [bytes_of(cache)]
    return out[:, whole.shape[1] :].tolist()


def copies_of_compressed(p: Problem, ctx: mf.Context) -> list[list[int]]:
    """32 copies of a compressed cache, in plain torch: transformers' model, SDPA and a greedy loop."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(ctx.keys, ctx.values, strict=True)):
        cache.update(keys[None].repeat(QUESTIONS, 1, 1, 1), values[None].repeat(QUESTIONS, 1, 1, 1), layer)
    tokens = torch.tensor(p.ids, device=ctx.keys.device)
    position, said = ctx.position, []
    with torch.inference_mode():
        for _ in range(NEW):
            count = tokens.shape[1]
            positions = torch.arange(position, position + count, device=tokens.device)[None].expand(QUESTIONS, -1)
            hidden = p.vlm.text.decoder(input_ids=tokens, position_ids=positions, use_cache=True, **{CACHE: cache})
            tokens = p.vlm.text.logits(hidden.last_hidden_state[:, -1:]).argmax(-1)
            said.append(tokens[:, 0])
            position += count
    return torch.stack(said, 1).tolist()


def ask(p: Problem, ctx: mf.Context) -> list[list[int]]:
    answers = ctx.ask_many(p.questions, max_new_tokens=NEW, batch_size=QUESTIONS)
    return [a.input_ids[a.layout.prompt_length :].tolist() for a in answers]


def agree(name: str, got: list[list[int]], expected: list[list[int]]) -> None:
    wrong = sum(a != b for a, b in zip(got, expected, strict=True))
    if wrong:
        raise SystemExit(f"{name}: {wrong} of {len(expected)} answers differ: no figures for wrong answers")


def questions(p: Problem, rounds: int) -> dict:
    p.vlm.model.generation_config.eos_token_id = None
    prefix = p.prefix_cache()
    ctx, everything = (p.vlm.compress(p.picture, keep, p.prompt, "query") for keep in (KEEP, 1.0))
    peak: list[int] = []
    reused = copied(p, prefix)
    agree("everything kept against the cache reused", ask(p, everything), reused)
    agree("one batch of copies against the cache reused", batched(p, prefix, peak), reused)
    agree("from the picture against the cache reused", from_the_picture(p), reused)
    agree("5 % against copies of it in torch", ask(p, ctx), copies_of_compressed(p, ctx))
    del everything
    times = in_turn(
        {
            "generate from the picture": lambda: from_the_picture(p),
            "uncompressed cache, copied": lambda: copied(p, prefix),
            "uncompressed cache, 32 copies": lambda: batched(p, prefix, peak),
            "compressed cache, 32 copies": lambda: copies_of_compressed(p, ctx),
            "ask_many": lambda: ask(p, ctx),
        },
        rounds,
    )
    own = session_bytes(p, ctx)
    ours = times["ask_many"]
    return {
        "prefix": p.layout.length,
        "kept": ctx.num_tokens,
        "seconds": {name: median(each) for name, each in times.items()},
        "times faster": {
            name: median([a / b for a, b in zip(each, ours, strict=True)]) for name, each in times.items()
        },
        "context megabytes": ctx.nbytes / 1e6,
        "uncompressed megabytes": ctx.full_nbytes / 1e6,
        "context over uncompressed": ctx.nbytes / ctx.full_nbytes,
        "peak megabytes": {"32 copies": peak[0] / 1e6, "ask_many": (ctx.nbytes + own) / 1e6},
        "peak over 32 copies": (ctx.nbytes + own) / peak[0],
    }


def session_bytes(p: Problem, ctx: mf.Context) -> int:
    """Most bytes of the questions' own keys and values while `ask_many` runs."""
    from mllm_fast.context import questions as module

    seen: list = []
    made = module.SharedPrefixDecoder
    module.SharedPrefixDecoder = lambda *a, **k: seen.append(made(*a, **k)) or seen[-1]
    try:
        ask(p, ctx)
    finally:
        module.SharedPrefixDecoder = made
    return max(session.nbytes for session in seen)


def files(p: Problem, rounds: int) -> dict:
    ctx = p.vlm.compress(p.picture, KEEP, p.prompt, "query")
    with tempfile.TemporaryDirectory() as folder:
        mine, plain = Path(folder) / "context.safetensors", Path(folder) / "plain.safetensors"
        tensors = {"keys": ctx.keys.cpu(), "values": ctx.values.cpu()}
        ctx.save(mine)
        again = mf.Context.load(mine, p.vlm)
        if not (torch.equal(again.keys, ctx.keys) and torch.equal(again.values, ctx.values)):
            raise SystemExit("the loaded context differs: no figures for a wrong file")

        def read_again() -> mf.Answer:
            return p.vlm.compress(p.picture, KEEP, p.prompt, "query").ask(p.questions[0], max_new_tokens=NEW)

        def generate_again() -> list[int]:
            return from_the_picture(p, 1)[0]

        def load_and_ask() -> mf.Answer:
            return mf.Context.load(mine, p.vlm).ask(p.questions[0], max_new_tokens=NEW)

        def save_and_flush() -> None:
            save_file(tensors, plain)
            with plain.open("rb+") as file:
                os.fsync(file.fileno())

        if read_again().token_ids != load_and_ask().token_ids:
            raise SystemExit("the loaded context answers otherwise: no figures for a wrong file")
        times = in_turn(
            {
                "save": lambda: ctx.save(mine),
                "safetensors, save": lambda: save_file(tensors, plain),
                "safetensors, save and flush": save_and_flush,
                "load": lambda: mf.Context.load(mine, p.vlm),
                # its tensors lie in the file until they are touched: copied, as ours are
                "safetensors, load": lambda: [tensor.clone() for tensor in load_file(plain).values()],
                "picture, compress, ask": read_again,
                "picture, generate": generate_again,
                "load, ask": load_and_ask,
            },
            rounds,
            warm_up=2,
        )
        sizes = mine.stat().st_size, plain.stat().st_size
        small = Path(folder) / "int8.safetensors"
        errors = ctx.save(small, "int8")
        ms = {name: median(each) * 1e3 for name, each in times.items()}
        ours = ms["save"] + ms["load"]
        return {
            "ms": ms,
            "over safetensors": ours / (ms["safetensors, save"] + ms["safetensors, load"]),
            # a context is on the disk when `save` returns
            "over safetensors, flushed": ours / (ms["safetensors, save and flush"] + ms["safetensors, load"]),
            "loading is faster": min(ms["picture, compress, ask"], ms["picture, generate"]) / ms["load, ask"],
            "megabytes": {"context": sizes[0] / 1e6, "plain": sizes[1] / 1e6, "int8": small.stat().st_size / 1e6},
            "int8 errors": errors,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--grid", type=int, default=24, help="image tokens a side")
    parser.add_argument("--out", type=Path, default=None, help="write the JSON line here too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    problem = Problem(args.device, getattr(torch, args.dtype), args.hidden, args.layers, args.grid)
    result: dict = {"benchmark": "reprompt", "machine": machine(), "device": args.device, "dtype": args.dtype}
    if args.device != "cpu":
        result["device"] = torch.cuda.get_device_name(args.device)
    result["questions"] = found = questions(problem, args.rounds)
    for name, seconds in found["seconds"].items():
        ratio = found["times faster"][name]
        print(
            f"{name:30s} {seconds:7.2f} s  {QUESTIONS / seconds:7.1f} questions/s; ask_many is {ratio:.2f} times faster"
        )
    print(
        f"context {found['context megabytes']:.1f} MB of {found['uncompressed megabytes']:.1f}"
        f" ({found['context over uncompressed']:.3f}); cache at its peak {found['peak megabytes']['ask_many']:.1f} MB,"
        f" 32 copies {found['peak megabytes']['32 copies']:.1f} ({found['peak over 32 copies']:.4f})"
    )
    result["files"] = found = files(problem, 3 * args.rounds)
    print(", ".join(f"{name} {ms:.1f} ms" for name, ms in found["ms"].items()))
    print(
        f"save and load over safetensors alone: {found['over safetensors']:.2f}, with its file flushed to the disk as"
        f" ours is {found['over safetensors, flushed']:.2f}; loading and asking is"
        f" {found['loading is faster']:.1f} times faster than reading the picture; {found['megabytes']}"
    )
    print(json.dumps(result))
    write_result(args.out, result)


if __name__ == "__main__":
    main()
