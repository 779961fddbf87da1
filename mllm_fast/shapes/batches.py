"""Training batches: several questions a picture in one sequence, and patch-level targets.

A picture's 144 image tokens cost far more than a question's dozen, so each picture carries several
questions. In an *isolated* sample each question sees the picture and itself alone and takes the
positions of a first turn (a block mask), which equals one question a prompt. In a *chained* sample
the questions are the turns of one conversation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .build import GRID, PATCH
from .questions import Question, ask
from .scenes import CANVAS, COLORS, SHAPES, Scene, generate_scene

NUM_IMAGE_TOKENS = GRID * GRID
IGNORE = -100
_COLOR_NAMES = tuple(COLORS)
_MIX = ("color",) * 3 + ("shape",) * 2 + ("exists",) * 3 + ("count",)
_CENTERS = (np.stack(np.meshgrid(np.arange(GRID), np.arange(GRID)), -1).reshape(-1, 2) + 0.5) * PATCH


@dataclass
class PatchTargets:
    """What each patch shows: class 0 for background, `IGNORE` where an object covers under a fifth of
    it. `shape`, `color` int64 [B, 144]. `offset` float32 [B, 144, 2]: (x, y) from the patch to its object's
    centre in units of 16 pixels; `place`: that centre itself, -1 to 1 over the canvas; both NaN outside
    objects."""

    shape: torch.Tensor
    color: torch.Tensor
    offset: torch.Tensor
    place: torch.Tensor


@dataclass
class Batch:
    """`input_ids`, `position_ids`, `labels` int64 [B, L]; `visible` bool [B, L, L]; `turn` int64 [B, L],
    0 for the picture's prefix, -1 for padding; `last` bool [B, L], the last prompt token of a question
    with keywords, in order of `keywords` int64 [n, 2]; `tasks` one list of task names a sample."""

    pixel_values: torch.Tensor
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    visible: torch.Tensor
    turn: torch.Tensor
    question: torch.Tensor
    last: torch.Tensor
    keywords: torch.Tensor
    tasks: list[list[str]]
    targets: PatchTargets


def normalize(scenes: list[Scene]) -> torch.Tensor:
    """Pixels as the processor gives them: float32 [B, 3, 96, 96] in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([s.pixels for s in scenes]))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def patch_targets(scenes: list[Scene]) -> PatchTargets:
    """Targets of every patch of every scene, from the objects' masks."""
    size = (len(scenes), NUM_IMAGE_TOKENS)
    shape, color = np.zeros(size, np.int64), np.zeros(size, np.int64)
    offset = np.full((*size, 2), np.nan, np.float32)
    place = offset.copy()
    for b, scene in enumerate(scenes):
        masks = np.stack([o.mask for o in scene.objects])
        cover = masks.reshape(-1, GRID, PATCH, GRID, PATCH).mean((2, 4)).reshape(len(masks), -1)
        owner = cover.argmax(0)
        share = cover.max(0)
        shape[b] = np.array([SHAPES.index(o.shape) + 1 for o in scene.objects])[owner]
        color[b] = np.array([_COLOR_NAMES.index(o.color) + 1 for o in scene.objects])[owner]
        centers = np.array([o.center for o in scene.objects])[owner]
        offset[b] = (centers - _CENTERS) / 16
        place[b] = centers / (CANVAS / 2) - 1
        for target in (shape, color):
            target[b][share < 0.2] = IGNORE
            target[b][share == 0] = 0
        offset[b][share < 0.2] = np.nan
        place[b][share < 0.2] = np.nan
    return PatchTargets(*(torch.from_numpy(x) for x in (shape, color, offset, place)))


def vision_batch(rng: np.random.Generator, size: int) -> tuple[torch.Tensor, PatchTargets]:
    """Pictures and their patch targets, for the vision tower alone."""
    scenes = [generate_scene(rng) for _ in range(size)]
    return normalize(scenes), patch_targets(scenes)


class BatchMaker:
    """Draws scenes and questions and packs them into sequences of one fixed length."""

    def __init__(self, tokenizer, length: int = 240):
        self.tokenizer = tokenizer
        self.length = length
        self.image_id = tokenizer.convert_tokens_to_ids("<image>")
        head = tokenizer("USER: <image>").input_ids
        self.prefix = [*head[:-1], *[self.image_id] * NUM_IMAGE_TOKENS]
        self.image_start = len(head) - 1
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._cache[text]

    def draw(self, rng: np.random.Generator, size: int, max_objects: int, chained: float, describe: float) -> Batch:
        """`chained`: share of samples that are one conversation; `describe`: share that ask for it."""
        scenes = [generate_scene(rng, max_objects=max_objects) for _ in range(size)]
        shape = (size, self.length)
        batch = Batch(
            pixel_values=normalize(scenes),
            input_ids=torch.full(shape, self.tokenizer.pad_token_id),
            position_ids=torch.zeros(shape, dtype=torch.long),
            labels=torch.full(shape, IGNORE),
            visible=torch.empty(0),
            turn=torch.full(shape, -1),
            question=torch.zeros(shape, dtype=torch.bool),
            last=torch.zeros(shape, dtype=torch.bool),
            keywords=torch.empty(0),
            tasks=[],
            targets=patch_targets(scenes),
        )
        keywords: list[list[int]] = []
        is_chained = torch.zeros(size, dtype=torch.bool)
        for b, scene in enumerate(scenes):
            is_chained[b] = rng.random() < chained
            questions = _questions(scene, rng, describe)
            batch.tasks.append(self._pack(batch, b, questions, bool(is_chained[b]), keywords))
        same = batch.turn[:, None, :] == batch.turn[:, :, None]
        earlier = is_chained[:, None, None] & (batch.turn[:, None, :] >= 0)
        visible = (batch.turn[:, None, :] == 0) | same | earlier
        batch.visible = visible & torch.ones(self.length, self.length, dtype=torch.bool).tril()
        batch.keywords = torch.tensor(keywords, dtype=torch.long).reshape(-1, 2)
        return batch

    def _pack(self, batch: Batch, b: int, questions: list[Question], chained: bool, keywords: list) -> list[str]:
        n = len(self.prefix)
        batch.input_ids[b, :n] = torch.tensor(self.prefix)
        batch.position_ids[b, :n] = torch.arange(n)
        batch.turn[b, :n] = 0
        tasks: list[str] = []
        at = n
        for question in questions:
            lead = "USER: " if chained and tasks else ""
            prompt = self.encode(f"{lead}{question.text} ASSISTANT:")
            answer = [*self.encode(question.answer), self.tokenizer.eos_token_id]
            end = at + len(prompt) + len(answer)
            if end > self.length:
                continue
            batch.input_ids[b, at:end] = torch.tensor(prompt + answer)
            batch.labels[b, at + len(prompt) : end] = torch.tensor(answer)
            start = at if chained else n
            batch.position_ids[b, at:end] = start + torch.arange(end - at)
            tasks.append(question.task)
            batch.turn[b, at:end] = len(tasks)
            batch.question[b, at : at + len(prompt) - 1] = True
            if question.keywords:
                batch.last[b, at + len(prompt) - 1] = True
                ids = [self.encode(word)[0] for word in question.keywords]
                keywords.append((ids * 2)[:2])
            at = end
        return tasks


def _questions(scene: Scene, rng: np.random.Generator, describe: float) -> list[Question]:
    kinds = [_MIX[i] for i in rng.permutation(len(_MIX))][:6]
    if rng.random() < describe:
        kinds[int(rng.integers(3))] = "describe"
    return [ask(scene, rng, kind) or _exists(scene, rng) for kind in kinds]


def _exists(scene: Scene, rng: np.random.Generator) -> Question:
    question = ask(scene, rng, "exists")
    assert question is not None  # every scene allows it
    return question
