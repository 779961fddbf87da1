"""Training batches of clips, with several questions about each clip in one sequence.

Each question sees only the clip and itself, by a block mask, and takes the positions of a first turn, which equals one
prompt a question.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .batches import IGNORE
from .build import CLIP_GRID, PATCH
from .clip_questions import FRAME_NUMBERS, TASKS, ClipQuestion, ask, half_of
from .clips import FRAMES, Clip, generate_clip
from .scenes import COLORS, SHAPES

TOKENS = CLIP_GRID * CLIP_GRID  # of a frame
_COLOR_NAMES = tuple(COLORS)
_ROOM = 128  # tokens of the questions about one clip
_BLIND_HALVES = 0.95
_BARE = 0.3  # share of the questions with less to see that see what they ask about alone


@dataclass
class ClipBatch:
    """A training batch of sequences with clips of one length.

    Attributes:
        pixel_values: The frames, float32 [B * frames, 3, 64, 64].
        input_ids, position_ids, labels: The tokens, their positions and the targets, int64 [B, L].
        visible: The attention mask, bool [B, L, L].
        turn: The question of each token, int64 [B, L]. 0 is the clip and -1 is padding.
        last: Marks the last prompt token of each question with keywords, bool [B, L].
        keywords: The keywords of these questions, in the order of `last`, int64 [n, 2].
        evidence: Which image tokens show what these questions ask about, bool [n, frames * 64].
        tasks: One list of task names a sample.
        shape, color: What each patch shows, int64 [B * frames, 64]; 0 is background, `IGNORE` little of an object.
        half: The word for the half in which the object of a patch appears, int64 [B * frames, 64]: in the frames from
            its appearance to the end of that half, and `IGNORE` elsewhere.
    """

    pixel_values: torch.Tensor
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    visible: torch.Tensor
    turn: torch.Tensor
    last: torch.Tensor
    keywords: torch.Tensor
    evidence: torch.Tensor
    tasks: list[list[str]]
    shape: torch.Tensor
    color: torch.Tensor
    half: torch.Tensor


def coverage(masks: np.ndarray) -> np.ndarray:
    """Return the share of each patch that a mask covers, [..., 64, 64] to [..., 64]."""
    split = masks.reshape(*masks.shape[:-2], CLIP_GRID, PATCH, CLIP_GRID, PATCH)
    return split.mean((-3, -1)).reshape(*masks.shape[:-2], TOKENS)


def normalize(clips: list[Clip]) -> torch.Tensor:
    """Return the frames as the processor gives them, float32 [frames of all, 3, 64, 64] in [-1, 1]."""
    pixels = torch.from_numpy(np.concatenate([clip.pixels for clip in clips]))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


class ClipBatches:
    """A generator of batches, which draws clips and questions and packs them into sequences of one length."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.image_id = tokenizer.convert_tokens_to_ids("<image>")
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._cache[text]

    def prefix(self, frames: int) -> list[int]:
        """Return the ids of a conversation's begin with a clip, up to its last frame."""
        ids = [self.tokenizer.bos_token_id, *self.encode("USER:")]
        for number in FRAME_NUMBERS[:frames]:
            ids += [*self.encode(f"frame {number} of {FRAME_NUMBERS[frames - 1]}:"), *[self.image_id] * TOKENS]
        return ids

    def draw(
        self, rng: np.random.Generator, size: int, max_objects: int, seen: float, blind: float, moves: float = 0.0
    ) -> ClipBatch:
        """Draw a batch.

        Args:
            rng: Draws everything.
            size: How many clips the batch has, all of one number of frames.
            max_objects: The most objects of a clip.
            seen: The share of the questions whose words and answers see all tokens of the clip. The others see those
                of what is asked about, and a random part of the rest.
            blind: The share of the questions whose words see nothing of the clip; of those about halves nearly all.
            moves: The share of the clips that are drawn until an object moves beside one of its shape that does not;
                some of the others have such objects too.
        """
        frames = int(rng.integers(FRAMES[0], FRAMES[1] + 1))
        clips = [_clip(rng, frames, max_objects, moves) for _ in range(size)]
        prefix = torch.tensor(self.prefix(frames))
        shape = size, len(prefix) + _ROOM
        places = (prefix == self.image_id).nonzero()[:, 0]
        what, tone = _targets(clips)
        batch = ClipBatch(
            pixel_values=normalize(clips),
            input_ids=torch.full(shape, self.tokenizer.pad_token_id),
            position_ids=torch.zeros(shape, dtype=torch.long),
            labels=torch.full(shape, IGNORE),
            visible=torch.empty(0),
            turn=torch.full(shape, -1),
            last=torch.zeros(shape, dtype=torch.bool),
            keywords=torch.empty(0),
            evidence=torch.empty(0),
            tasks=[],
            shape=what,
            color=tone,
            half=torch.from_numpy(np.concatenate([self._halves(clip) for clip in clips])),
        )
        batch.input_ids[:, : len(prefix)] = prefix
        batch.position_ids[:, : len(prefix)] = torch.arange(len(prefix))
        batch.turn[:, : len(prefix)] = 0
        asked = [_questions(clip, rng) for clip in clips]
        keywords: list[list[int]] = []
        for b, questions in enumerate(asked):
            batch.tasks.append(self._pack(batch, b, questions, len(prefix), keywords))
        batch.keywords = torch.tensor(keywords, dtype=torch.long).reshape(-1, 2)
        named = [
            _evidence(clip, question)
            for clip, questions, tasks in zip(clips, asked, batch.tasks, strict=True)
            for question in questions[: len(tasks)]
            if question.keywords
        ]
        batch.evidence = torch.from_numpy(np.stack(named)) if named else torch.zeros(0, len(places), dtype=torch.bool)
        visible = (batch.turn[:, None, :] == 0) | (batch.turn[:, None, :] == batch.turn[:, :, None])
        for b, (clip, questions) in enumerate(zip(clips, asked, strict=True)):
            for turn, question in enumerate(questions[: len(batch.tasks[b])], 1):
                rows = batch.turn[b] == turn
                if question.target is not None and rng.random() >= seen:
                    keep = 0.0 if rng.random() < _BARE else rng.random()
                    hidden = ~_evidence(clip, question) & (rng.random(len(places)) >= keep)
                    visible[b, rows.nonzero(), places[torch.from_numpy(hidden)]] = False
                share = max(blind, _BLIND_HALVES * (blind > 0)) if question.task == "appears" else blind
                if question.target is not None and rng.random() < share:
                    words = rows & (batch.labels[b] == IGNORE)
                    words[words.nonzero()[-1]] = False
                    visible[b, words.nonzero(), places] = False
        batch.visible = visible & torch.ones(shape[1], shape[1], dtype=torch.bool).tril()
        return batch

    def _halves(self, clip: Clip) -> np.ndarray:
        found = np.full((len(clip.pixels), TOKENS), IGNORE)
        for one in clip.objects:
            if one.event == "appears":
                half, last = half_of(clip, one)
                shown = coverage(one.masks[one.at : last + 1]) >= 0.2
                found[one.at : last + 1][shown] = self.encode(half)[0]
        return found

    def _pack(self, batch: ClipBatch, b: int, questions: list[ClipQuestion], begin: int, keywords: list) -> list[str]:
        tasks: list[str] = []
        at = begin
        for question in questions:
            prompt = self.encode(f"{question.text} ASSISTANT:")
            answer = [*self.encode(question.answer), self.tokenizer.eos_token_id]
            end = at + len(prompt) + len(answer)
            if end > batch.input_ids.shape[1]:
                break
            batch.input_ids[b, at:end] = torch.tensor(prompt + answer)
            batch.labels[b, at + len(prompt) : end] = torch.tensor(answer)
            batch.position_ids[b, at:end] = begin + torch.arange(end - at)
            tasks.append(question.task)
            batch.turn[b, at:end] = len(tasks)
            if question.keywords:
                batch.last[b, at + len(prompt) - 1] = True
                ids = [self.encode(word)[0] for word in question.keywords]
                keywords.append((ids * 2)[:2])
            at = end
        return tasks


def _clip(rng: np.random.Generator, frames: int, max_objects: int, moves: float) -> Clip:
    """Draw a clip, by the share `moves` one whose question of what moves is about two objects of a shape."""
    wanted = moves > 0 and rng.random() < moves
    while True:
        clip = generate_clip(rng, frames, max_objects)
        events = [{one.event == "moves" for one in clip.objects if one.shape == shape} for shape in SHAPES]
        if not wanted or {True, False} in events:
            return clip


def _questions(clip: Clip, rng: np.random.Generator) -> list[ClipQuestion]:
    """Draw up to two questions of each kind, in random order."""
    drawn = [ask(clip, rng, str(task)) for task in rng.permutation([*TASKS, *TASKS[:-1]])]
    return list({one.text: one for one in drawn if one is not None}.values())


def _evidence(clip: Clip, question: ClipQuestion) -> np.ndarray:
    """Return which image tokens show what a question asks about, bool [frames * 64]."""
    shown = coverage(clip.objects[question.target].masks) > 0  # type: ignore[index]
    shown[: question.frames[0]] = False
    shown[question.frames[1] + 1 :] = False
    return shown.reshape(-1)


def _targets(clips: list[Clip]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the shape and the colour that each patch shows, see `ClipBatch`."""
    shapes, colors = [], []
    for clip in clips:
        cover = np.stack([coverage(one.masks) for one in clip.objects])  # [objects, frames, tokens]
        owner, share = cover.argmax(0), cover.max(0)
        shape = np.array([SHAPES.index(one.shape) + 1 for one in clip.objects])[owner]
        color = np.array([[_COLOR_NAMES.index(name) + 1 for name in one.colors] for one in clip.objects])
        color = color[owner, np.arange(len(clip.pixels))[:, None]]
        for target in (shape, color):
            target[share < 0.2] = IGNORE
            target[share == 0] = 0
        shapes.append(shape)
        colors.append(color)
    return torch.from_numpy(np.concatenate(shapes)), torch.from_numpy(np.concatenate(colors))
