"""What a model that is split over ranks gives, beside the whole model: a program that runs once a rank.

    split_cases.py FOLDER...

Each folder holds a model. A line of JSON is printed for each: the largest error of every case, relative to the largest
number, against the same model in one process, and what this rank holds.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils._pytree import tree_leaves

import mllm_fast as mf
from mllm_fast.core import split as split_module
from mllm_fast.core.split import is_sharded, local, place_of
from mllm_fast.models.fingerprint import fingerprint
from mllm_fast.runtime.batch import Batch

QUESTION, ANSWER = "what color is the circle ?", "red green , blue"
IMAGE = Image.fromarray(np.random.default_rng(7).integers(0, 256, (40, 64, 3), dtype=np.uint8))
METHODS = ("logprob", "attention", "rollout", "relevancy", "tam", "gradient-input")
RULES = mf.Knockout("image", "query+generated", layers=[0, 2])

Case = Callable[[mf.VLM], Any]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def ids(said: mf.Answer) -> torch.Tensor:
    return torch.tensor(said.token_ids)


@case
def logits(vlm: mf.VLM) -> torch.Tensor:
    inputs, _ = vlm.prepare(IMAGE, QUESTION)
    with torch.no_grad():
        return vlm.model(**inputs).logits


@case
def tokens(vlm: mf.VLM) -> torch.Tensor:
    return ids(vlm.generate(IMAGE, QUESTION, max_new_tokens=6))


@case
def knockouts(vlm: mf.VLM) -> list[torch.Tensor]:
    batch = vlm.generate([IMAGE, IMAGE], [QUESTION, "red ?"], max_new_tokens=4, knockout=RULES)
    return [*map(ids, batch), vlm.explain(IMAGE, QUESTION, ANSWER, knockout=RULES).head_scores]


def scores(vlm: mf.VLM, norm: str) -> list[torch.Tensor]:
    ex = vlm.explain(IMAGE, QUESTION, ANSWER, final_norm=norm)
    heads = [(layer, head) for layer in range(ex.num_layers) for head in range(ex.num_heads)][::3]
    return [ex.head_scores, ex.position_scores(1, heads), ex.heatmap(2)]


@case
def frozen(vlm: mf.VLM) -> list[torch.Tensor]:
    return scores(vlm, "frozen")


@case
def own(vlm: mf.VLM) -> list[torch.Tensor]:
    return scores(vlm, "own")


@case
def attention(vlm: mf.VLM) -> torch.Tensor:
    return vlm.explain(IMAGE, QUESTION, ANSWER).attention(1)


@case
def maps(vlm: mf.VLM) -> list[torch.Tensor]:
    ex = vlm.explain(IMAGE, QUESTION, ANSWER)
    return [ex.heatmap(1, method) for method in METHODS]


@case
def lens(vlm: mf.VLM) -> list[torch.Tensor]:
    ex = vlm.explain(IMAGE, QUESTION, ANSWER)
    at = ex.layout.prompt_length - 2
    wanted = [
        ("unembedding", 1, None),
        ("embedding", ex.num_heads - 1, None),
        ("unembedding", 2, at),
        ("embedding", "mlp", None),
    ]
    return [torch.tensor([v for *_, v in ex.project(1, 1, part, position=p, space=s, k=9)]) for s, part, p in wanted]


@case
def verified(vlm: mf.VLM) -> torch.Tensor:
    found = vlm.explain(IMAGE, QUESTION, ANSWER).verify(tokens=[1])
    return torch.tensor([found[0].log_prob, found[0].top, found[0].lowest, *found[0].random])


@case
def attention_shares(vlm: mf.VLM) -> list[torch.Tensor]:
    return list(vlm.generate(IMAGE, QUESTION, max_new_tokens=4, attention_share=True).attention_share.values())


@case
def streams(vlm: mf.VLM) -> list[torch.Tensor]:
    steps = list(vlm.stream(IMAGE, QUESTION, explain=True, max_new_tokens=3))
    return [part for step in steps for part in (step.head_scores, step.heatmap(), torch.tensor(step.log_prob))]


@case
def contexts(vlm: mf.VLM) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for score in ("key_norm", "generated"):
        ctx = vlm.compress(IMAGE, keep=0.4, score=score, max_new_tokens=2)
        found.append(ctx.positions)
    found += map(ids, ctx.ask_many(["is the circle red ?", "yes ?"], max_new_tokens=3))
    found += [ids(ctx.describe(max_new_tokens=3)), ctx.explain("is the circle red ?", "no").head_scores]
    return [*found, *(step.heatmap() for step in ctx.stream("red ?", explain=True, max_new_tokens=2))]


@case
def batches(vlm: mf.VLM) -> list[torch.Tensor]:
    """Rows of the server's batches: a shared prefix, and one of its own whose attention mass is summed."""
    asked = vlm.compress(IMAGE, keep=0.4, score="query").questions
    batch, found = Batch(vlm.text, vlm.backend), []
    for name, watch, first in (("a", False, [5, 6, 7]), ("a", False, [8]), (None, True, [9])):
        batch.join(asked.keys, asked.values, asked.position, first, name, watch)
    for _ in range(3):
        with vlm.text.inference(), batch.running():
            logits = batch.read()
        found.append(logits.cpu())
        for row, token in zip(batch.rows, logits.argmax(-1).tolist(), strict=True):
            row.unread = [token]
    mass, split = batch.rows[2].mass, vlm.text.split
    return [*found, mass.cpu() if split is None else split.mean(mass)]


@case
def own_calls(vlm: mf.VLM) -> list[torch.Tensor]:
    inputs, _ = vlm.prepare(IMAGE, QUESTION)
    with vlm.recording(RULES) as recorded:
        vlm.model.generate(**inputs, max_new_tokens=4, min_new_tokens=3, do_sample=False)
    return [recorded.explanation(IMAGE).head_scores]


def files(split: mf.VLM, whole: mf.VLM | None) -> dict[str, float]:
    """Return the errors of answers from files of contexts, which go from one model to the other."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [[str(Path(folder) / name)] for name in ("split.safetensors", "whole.safetensors")]
        for path in paths:
            dist.broadcast_object_list(path)

        def answer(path: list[str], vlm: mf.VLM) -> torch.Tensor:
            return ids(mf.Context.load(path[0], vlm).ask("is the circle red ?", max_new_tokens=4))

        split.compress(IMAGE, keep=0.4, score="query").save(paths[0][0])
        if whole is not None:
            whole.compress(IMAGE, keep=0.4, score="query").save(paths[1][0])
        dist.barrier()
        found = {"kept": answer(paths[0], split), "loaded": answer(paths[1], split)}
        if whole is None:
            return {}
        wanted = answer(paths[1], whole)
        found["saved"] = answer(paths[0], whole)
        return {name: error(one, wanted) for name, one in found.items()}


def result(run: Case, vlm: mf.VLM) -> Any:
    """Return what a case gives, or the message that refuses it."""
    try:
        return run(vlm)
    except mf.InputError as error:
        return str(error)


def error(got: Any, want: Any) -> float:
    """Return the largest error relative to the largest number; infinite for other shapes or whole numbers."""
    if isinstance(want, str):
        return 0.0 if got == want else float("inf")
    if isinstance(want, list):
        return max(map(error, got, want)) if len(got) == len(want) else float("inf")
    if got.shape != want.shape or not want.numel():
        return float("inf") if got.shape != want.shape else 0.0
    if not want.is_floating_point():
        return 0.0 if torch.equal(got, want) else float("inf")
    return float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-30))


class Counted:
    """torch.distributed, with a note of how many bytes this rank hands to each call."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, int]] = []

    def __getattr__(self, name: str) -> Any:
        function = getattr(dist, name)
        if name not in ("all_gather", "all_reduce", "broadcast", "barrier"):
            return function

        def call(*args: Any, **options: Any) -> Any:
            given = args[1] if name == "all_gather" else args[0] if args else None
            self.sent.append((name, 0 if given is None else given.nbytes))
            return function(*args, **options)

        return call


def traffic(vlm: mf.VLM) -> dict[str, list[tuple[str, int]]]:
    """Return what the explanation of one token sends, beyond what the model's own forward pass does."""
    ex, found = vlm.explain(IMAGE, QUESTION, "red"), {}
    for name, score in (("heads", lambda: ex.head_scores), ("positions", lambda: ex.position_scores(0))):
        with mock.patch.object(split_module, "dist", Counted()) as counted:
            score()
        found[name] = counted.sent
    return found


def held(vlm: mf.VLM) -> tuple[int, int, int]:
    """Return how many numbers of divided weights there are, how many this rank holds, and how many are replicated."""
    every = list({id(one): one for one in vlm.model.parameters()}.values())
    divided = [one for one in every if is_sharded(one) and place_of(one) is not None]
    whole = sum(local(one).numel() for one in every if not any(one is other for other in divided))
    return sum(one.numel() for one in divided), sum(local(one).numel() for one in divided), whole


def alike(found: Any) -> bool:
    """Return whether every rank found the same, bit by bit."""
    digest = hashlib.sha256()
    for one in tree_leaves(found):
        digest.update(one.numpy().tobytes() if isinstance(one, torch.Tensor) else str(one).encode())
    every = [b""] * dist.get_world_size()
    dist.all_gather_object(every, digest.digest())
    return len(set(every)) == 1


def main() -> None:
    """The first rank compares with the whole model; the others have found the same as it."""
    torch.set_num_threads(1)
    for folder in sys.argv[1:]:
        split, whole = mf.VLM.from_pretrained(folder, device="cpu", dtype="float64", tp="auto"), None
        if not dist.get_rank():
            whole = mf.VLM.from_pretrained(folder, device="cpu", dtype="float64")
        got = {name: result(run, split) for name, run in CASES.items()}
        same = {name: alike(one) for name, one in got.items()}
        errors = {} if whole is None else {name: error(one, result(CASES[name], whole)) for name, one in got.items()}
        dist.barrier()  # the others wait for no longer than a call may take
        errors |= files(split, whole)
        name = fingerprint(split.model)
        errors["fingerprint"] = 0.0 if whole is None or name == fingerprint(whole.model) else 1.0
        torch.manual_seed(dist.get_rank())  # every rank another one
        same["sampled"] = alike(ids(split.generate(IMAGE, QUESTION, max_new_tokens=8, do_sample=True, temperature=3.0)))
        found = {"model": Path(folder).name, "errors": errors, "alike": same, "held": held(split)}
        text = split.text
        found |= {"traffic": traffic(split), "write": len(text.sites) * len(text.heads) * text.width * 8}
        print(json.dumps(found), flush=True)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
