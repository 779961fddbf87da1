"""Measure the accuracy of the embedded model on scenes it never saw: `python -m mllm_fast.shapes.evaluate`.

The evaluation uses only public interfaces: from_pretrained, the processor's chat template and `generate`. An answer
counts only if it is right to the letter.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..models.loading import load_pretrained, model_folder
from .questions import TASKS, Question, ask
from .scenes import Scene, generate_scene
from .second_renderer import draw_scene

RENDERERS: dict[str, Callable[..., Scene]] = {"own": generate_scene, "second": draw_scene}
SEED = 20_411  # differs from the seeds of training (1) and of its held-out scenes (1,000,000)
TABLE = Path(__file__).parent / "accuracy.json"
_BATCH = 50


class Asker:
    """A model with its processor that answers questions in batches."""

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model, processor

    def __call__(self, scenes: list[Scene], chats: list[list[str]]) -> list[str]:
        """Return the answer to the last question of each chat; a chat is a list of question, answer, ..., question."""
        answers: list[str] = []
        for start in range(0, len(scenes), _BATCH):
            texts = [self._prompt(chat) for chat in chats[start : start + _BATCH]]
            pictures = [[scene.image] for scene in scenes[start : start + _BATCH]]
            inputs = self.processor(images=pictures, text=texts, return_tensors="pt", padding=True)
            inputs = inputs.to(self.model.device, self.model.dtype)
            with torch.inference_mode():
                output = self.model.generate(**inputs, max_new_tokens=32, do_sample=False)
            output = output[:, inputs["input_ids"].shape[1] :]
            answers += [text.strip() for text in self.processor.batch_decode(output, skip_special_tokens=True)]
        return answers

    def _prompt(self, chat: list[str]) -> str:
        messages = []
        for i, text in enumerate(chat):
            content: list[dict[str, str]] = [{"type": "text", "text": text}]
            if i == 0:
                content.insert(0, {"type": "image"})
            messages.append({"role": "user" if i % 2 == 0 else "assistant", "content": content})
        return self.processor.apply_chat_template(messages, add_generation_prompt=True)


def single_turn(ask_model: Asker, renderer: str, scenes: int, seed: int) -> dict[str, float]:
    """Return the accuracy by task over `scenes` questions per task, each about a scene of its own."""
    accuracy = {}
    for task in TASKS:
        rng = np.random.default_rng([seed, TASKS.index(task)])
        drawn, questions = _draw(rng, renderer, task, scenes)
        answers = ask_model(drawn, [[q.text] for q in questions])
        right = [a == q.answer for a, q in zip(answers, questions, strict=True)]
        accuracy[task] = round(float(np.mean(right)), 4)
    return accuracy


def conversations(ask_model: Asker, scenes: int, seed: int, turns: int = 4) -> dict[str, float]:
    """Return the accuracy by turn in conversations where the model sees its own earlier answers."""
    rng = np.random.default_rng([seed, 99])
    drawn: list[Scene] = []
    questions: list[list[Question]] = []
    while len(drawn) < scenes:
        scene = generate_scene(rng)
        asked = [q for task in rng.permutation(TASKS)[:turns] if (q := ask(scene, rng, str(task)))]
        if len(asked) == turns:
            drawn.append(scene)
            questions.append(asked)
    chats: list[list[str]] = [[] for _ in drawn]
    accuracy = {}
    for turn in range(turns):
        for chat, asked in zip(chats, questions, strict=True):
            chat.append(asked[turn].text)
        answers = ask_model(drawn, chats)
        right = [a == asked[turn].answer for a, asked in zip(answers, questions, strict=True)]
        accuracy[f"turn {turn + 1}"] = round(float(np.mean(right)), 4)
        for chat, answer in zip(chats, answers, strict=True):
            chat.append(answer)
    return accuracy


def _draw(rng: np.random.Generator, renderer: str, task: str, count: int) -> tuple[list[Scene], list[Question]]:
    scenes: list[Scene] = []
    questions: list[Question] = []
    while len(scenes) < count:
        scene = RENDERERS[renderer](rng)
        question = ask(scene, rng, task)
        if question is not None:
            scenes.append(scene)
            questions.append(question)
    return scenes, questions


def weights_digest(folder: str | Path, name: str = "model.safetensors") -> str:
    """Return the SHA-256 digest of a model's weights, which ties the accuracy table to these weights."""
    return hashlib.sha256((Path(folder) / name).read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes", help="'shapes', or a folder that train.py wrote")
    parser.add_argument("--scenes", type=int, default=1000, help="questions a task")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument(
        "--write", action="store_true", help=f"keep the table in {TABLE.name}, beside the weights' digest"
    )
    args = parser.parse_args()
    ask_model = Asker(*load_pretrained(args.model, torch.device("cpu"), torch.float32))
    table: dict[str, Any] = {"scenes": args.scenes, "seed": args.seed}
    for renderer in RENDERERS:
        table[renderer] = single_turn(ask_model, renderer, args.scenes, args.seed)
        print(
            f"{renderer:7s} " + "  ".join(f"{task} {share:.3f}" for task, share in table[renderer].items()), flush=True
        )
    table["conversation"] = conversations(ask_model, args.scenes // 2, args.seed)
    print("chat    " + "  ".join(f"{turn} {share:.3f}" for turn, share in table["conversation"].items()))
    table["weights_sha256"] = weights_digest(model_folder(args.model))
    print(json.dumps(table))
    if args.write:
        TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
