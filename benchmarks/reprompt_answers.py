"""Are answers from a context those of the definition? `python benchmarks/reprompt_answers.py`: greedy answers of the
embedded model over generated scenes, token by token.

For each scene, one question of every kind, in one batch (`ask_many`):
- a context that keeps 5 or 20 % against eager attention over the whole sequence with the dropped tokens masked, layer
  by layer (`tests/knocked.py`);
- one that keeps everything against transformers' own generation from the picture, the prompt and the question;
- each question of the batch against the same asked alone;
- a context that was saved and loaded against itself: the logits bit for bit.

Exit code 1 on any difference. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from harness import machine, write_result

import mllm_fast as mf
from mllm_fast.context.compress import prefill_and_score
from mllm_fast.runtime.shared_prefix import SharedPrefixDecoder
from mllm_fast.shapes.questions import TASKS, ask
from mllm_fast.shapes.scenes import generate_scene

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import knocked

PROMPT = "Describe the image."
WORDS = 20


def draw(count: int, seed: int) -> list[tuple]:
    rng = np.random.default_rng(seed)
    drawn: list[tuple] = []
    while len(drawn) < count:
        scene = generate_scene(rng)
        asked = [ask(scene, rng, task) for task in TASKS]
        if all(asked):
            drawn.append((scene.image, [q.text for q in asked if q is not None]))
    return drawn


def generated(vlm: mf.VLM, picture, more: list[int], ctx: mf.Context | None) -> list[int]:
    """transformers' greedy answer over the whole sequence; with a context, what it dropped is masked."""
    inputs = knocked.whole(vlm, [picture], PROMPT, more)
    settings = {"max_new_tokens": WORDS, "do_sample": False}
    with torch.inference_mode():
        if ctx is None:
            out = vlm.model.generate(**inputs, **settings)
        else:
            with knocked.eager(vlm, knocked.dropped(ctx), [ctx.layout]):
                out = vlm.model.generate(**inputs, **settings)
    ids = out[0, inputs["input_ids"].shape[1] :].tolist()
    while ids and ids[-1] in vlm.prompts.stop_ids({}):
        ids.pop()
    return ids


def logits(vlm: mf.VLM, ctx: mf.Context, ids: list[list[int]]) -> torch.Tensor:
    session = SharedPrefixDecoder(vlm.text, ctx.keys, ctx.values, ctx.position, len(ids), vlm.backend)
    with session.recording(), torch.inference_mode():
        return session.read(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=5_150)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None, help="write the JSON line here too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    vlm = mf.VLM.from_pretrained("shapes", device="cpu")
    answers, different = 0, dict.fromkeys(("5 %", "20 %", "everything", "alone", "loaded"), 0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "context.safetensors"
        for n, (picture, questions) in enumerate(draw(args.scenes, args.seed)):
            reading = prefill_and_score(vlm, picture, PROMPT, ["generated"])
            ids = [vlm.prompts.turn_ids(PROMPT, 1, question) for question in questions]
            for label, keep in (("5 %", 0.05), ("20 %", 0.2), ("everything", 1.0)):
                ctx = reading.context(keep)
                said = ctx.ask_many(questions, max_new_tokens=WORDS)
                for question, more, one in zip(questions, ids, said, strict=True):
                    expected = generated(vlm, picture, more, None if keep == 1.0 else ctx)
                    if one.token_ids != expected:
                        different[label] += 1
                        print(f"scene {n}, {label}, {question!r}: {one.token_ids}, expected {expected}", flush=True)
                    answers += 1
                if keep == 0.2:
                    alone = [ctx.ask(question, max_new_tokens=WORDS).token_ids for question in questions]
                    different["alone"] += sum(a != b.token_ids for a, b in zip(alone, said, strict=True))
                    ctx.save(path)
                    again = mf.Context.load(path, vlm)
                    different["loaded"] += not torch.equal(logits(vlm, again, ids), logits(vlm, ctx, ids))
    print(f"{args.scenes} scenes, {answers} answers against the definition; different: {different}")
    result = {
        "benchmark": "reprompt_answers",
        "machine": machine(),
        "scenes": args.scenes,
        "answers": answers,
        "different": different,
    }
    print(json.dumps(result))
    write_result(args.out, result)
    raise SystemExit(1 if any(different.values()) else 0)


if __name__ == "__main__":
    main()
