"""Training batches with several questions per image in one sequence, and targets for each patch.

The 144 tokens of an image cost far more than the dozen of a question, so each image carries several questions. There
are three kinds of samples:

- *isolated*: Each question sees only the image and itself, by a block mask, and takes the positions of a first turn.
  This equals one prompt per question.
- *chained*: The questions are the turns of one conversation.
- *prefixed*: The first turn asks for a description. Every later question sees the image's prefix, the words that asked
  for the description, and itself, but not the description. A compressed context keeps the same of a first turn. A
  random part of the image tokens is hidden from the later questions, so that the asking words learn to sum up the
  image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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


class Mix(NamedTuple):
    """The mix of samples in a batch.

    Attributes:
        chained: The share of chained samples.
        prefixed: The share of prefixed samples. The remaining samples are isolated.
        describe: The share of the chained and isolated samples that ask for a description.
        describe_turns: The description is asked for in one of this many first turns.
        later: How the later turns of a prefixed sample see the image. "part": all of it (one turn of four), or a share
            of its tokens that is often small. "by object": all of it (one of four), nothing (35 in 100), or one share
            of the objects' tokens and another, often small, of the other tokens, because a compressed context keeps
            hardly any background. "everything": all of it.
        again: The share of the prefixed samples that ask for a description a second time, in a later turn.
    """

    chained: float
    prefixed: float = 0.0
    describe: float = 0.6
    describe_turns: int = 3
    later: str = "part"
    again: float = 0.0


@dataclass
class PatchTargets:
    """The training targets of each patch.

    Attributes:
        shape: The shape in the patch, int64 [B, 144]. 0 is background, and `IGNORE` marks patches of which an object
            covers less than a fifth.
        color: The colour in the patch, int64 [B, 144], with the same special values.
        offset: (x, y) from the patch to the centre of its object, in units of 16 pixels, float32 [B, 144, 2]. NaN
            outside objects.
        place: That centre itself, -1 to 1 over the canvas, float32 [B, 144, 2]. NaN outside objects.
    """

    shape: torch.Tensor
    color: torch.Tensor
    offset: torch.Tensor
    place: torch.Tensor


@dataclass
class Batch:
    """A training batch of sequences with images.

    Attributes:
        pixel_values: The images, float32 [B, 3, 96, 96].
        input_ids, position_ids, labels: The tokens, their positions and the targets, int64 [B, L].
        visible: The attention mask, bool [B, L, L].
        turn: The turn of each token, int64 [B, L]. 0 is the image's prefix and -1 is padding.
        question: Marks the words of questions, bool [B, L], without first turns that ask for a description.
        last: Marks the last prompt token of each question with keywords, bool [B, L].
        keywords: The keywords of these questions, in the order of `last`, int64 [n, 2].
        tasks: One list of task names per sample.
        targets: The targets of each patch.
    """

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
    """Return the scenes' pixels as the processor gives them, float32 [B, 3, 96, 96] in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([s.pixels for s in scenes]))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def patch_targets(scenes: list[Scene]) -> PatchTargets:
    """Compute the targets of every patch of every scene from the objects' masks."""
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
    """Draw images and their patch targets, to train the vision tower alone."""
    scenes = [generate_scene(rng) for _ in range(size)]
    return normalize(scenes), patch_targets(scenes)


class BatchMaker:
    """A generator of batches, which draws scenes and questions and packs them into sequences of one fixed length."""

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

    def draw(self, rng: np.random.Generator, size: int, max_objects: int, mix: Mix) -> Batch:
        """Draw a batch of `size` images with up to `max_objects` objects each, with questions about each image."""
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
        kinds = [_kind(rng.random(), mix) for _ in scenes]
        for b, (scene, kind) in enumerate(zip(scenes, kinds, strict=True)):
            first = [_always(scene, rng, "describe")] if kind == "prefixed" else []
            questions = first + _questions(scene, rng, mix.again if first else mix.describe, mix.describe_turns)
            batch.tasks.append(self._pack(batch, b, questions, kind, keywords))
        same = batch.turn[:, None, :] == batch.turn[:, :, None]
        is_chained = torch.tensor([kind == "chained" for kind in kinds])
        earlier = is_chained[:, None, None] & (batch.turn[:, None, :] >= 0)
        visible = (batch.turn[:, None, :] == 0) | same | earlier
        for b in (b for b, kind in enumerate(kinds) if kind == "prefixed"):
            self._look_back(batch, b, visible[b], rng, mix.later)
        batch.visible = visible & torch.ones(self.length, self.length, dtype=torch.bool).tril()
        batch.keywords = torch.tensor(keywords, dtype=torch.long).reshape(-1, 2)
        return batch

    def _look_back(self, batch: Batch, b: int, visible: torch.Tensor, rng: np.random.Generator, later: str) -> None:
        """Let later turns of a prefixed sample see the asking words and a random part of the image, see `Mix`."""
        asking = (batch.turn[b] == 1) & (batch.labels[b] == IGNORE)
        shown = (batch.targets.shape[b] != 0).numpy()
        for turn in range(2, len(batch.tasks[b]) + 1):
            rows = (batch.turn[b] == turn).nonzero()
            visible[rows, asking] = True
            if later == "everything":
                continue
            draw = rng.random()
            if draw < 0.25:
                kept: float | np.ndarray = 1.0
            elif later == "by object":
                kept = 0.0 if draw < 0.6 else np.where(shown, rng.random(), rng.random() ** 6)
            else:
                kept = rng.random() ** 2
            hidden = torch.from_numpy(rng.random(NUM_IMAGE_TOKENS) >= kept).nonzero()[:, 0]
            visible[rows, self.image_start + hidden] = False

    def _pack(self, batch: Batch, b: int, questions: list[Question], kind: str, keywords: list) -> list[str]:
        n = len(self.prefix)
        batch.input_ids[b, :n] = torch.tensor(self.prefix)
        batch.position_ids[b, :n] = torch.arange(n)
        batch.turn[b, :n] = 0
        tasks: list[str] = []
        at = begin = n
        for question in questions:
            describes = kind == "prefixed" and not tasks
            lead = "USER: " if kind != "isolated" and tasks else ""
            prompt = self.encode(f"{lead}{question.text} ASSISTANT:")
            if kind == "prefixed" and tasks:  # an end token closes the dropped answer
                prompt = [self.tokenizer.eos_token_id, *prompt]
            answer = [*self.encode(question.answer), self.tokenizer.eos_token_id]
            end = at + len(prompt) + len(answer)
            if end > self.length:
                continue
            batch.input_ids[b, at:end] = torch.tensor(prompt + answer)
            batch.labels[b, at + len(prompt) : end] = torch.tensor(answer)
            start = at if kind == "chained" else begin
            batch.position_ids[b, at:end] = start + torch.arange(end - at)
            if describes:
                begin += len(prompt)
            tasks.append(f"then {question.task}" if kind == "prefixed" and tasks else question.task)
            batch.turn[b, at:end] = len(tasks)
            batch.question[b, at : at + len(prompt) - 1] = not describes
            if question.keywords:
                batch.last[b, at + len(prompt) - 1] = True
                ids = [self.encode(word)[0] for word in question.keywords]
                keywords.append((ids * 2)[:2])
            at = end
        return tasks


def _kind(draw: float, mix: Mix) -> str:
    return "chained" if draw < mix.chained else "prefixed" if draw < mix.chained + mix.prefixed else "isolated"


def _questions(scene: Scene, rng: np.random.Generator, describe: float, describe_turns: int) -> list[Question]:
    kinds = [_MIX[i] for i in rng.permutation(len(_MIX))][:6]
    if rng.random() < describe:
        kinds[int(rng.integers(describe_turns))] = "describe"
    return [ask(scene, rng, kind) or _always(scene, rng, "exists") for kind in kinds]


def _always(scene: Scene, rng: np.random.Generator, task: str) -> Question:
    question = ask(scene, rng, task)
    assert question is not None  # every scene allows these tasks
    return question
