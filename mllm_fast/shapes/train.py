"""Train the embedded model from scratch: `python -m mllm_fast.shapes.train --out FOLDER`.

Training has five stages:

1. The vision tower learns what each patch shows.
2. The projector and the word embeddings learn to name it.
3. The whole model learns to answer.
4. At a lower rate, it learns to answer mostly from a random part of the objects and of the background.
5. At the same lower rate, it learns to answer, and to describe, mostly from the image tokens that its own description
   attended to, as in a compressed context. Only the language model is trained here, and the vision tower stays
   unchanged.

Two additions to the loss of the answers keep the model readable. A model that is trained on answers alone answers
right, but its residual stream does not decode into words. First, image tokens stay aligned with the words for what they
show. Second, early in the third stage, the last prompt token after layer 2 must decode to the word that is asked about
(the "lens" loss).

In most samples, question words cannot see the image, so that the last token fetches the answer from the image itself.
In a third of the samples, the first turn asks for a description, with words that always see the image. Later questions
see those words and a random part of the image. So the asking words learn to sum up the image, as those of a large model
do, and a compressed context relies on this. Figures of knockouts and of compression follow in part from this design.

The weights in the package were made in five runs. The first run had `--context-steps 0 --compressed-steps 0`. The next
four runs had `--start` with the result so far, and these options: `--compressed-steps 0`; `--context-steps 0 --again
0`; `--context-steps 0 --compressed-steps 400`; `--context-steps 0 --compressed-steps 500 --seed 5`. In the first four,
the description itself always saw the whole image.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlavaForConditionalGeneration

from .batches import IGNORE, NUM_IMAGE_TOKENS, Batch, BatchMaker, Mix, PatchTargets, vision_batch
from .build import build_model, build_processor, save
from .scenes import COLORS, SHAPES
from .training import PatchHeads, adamw, classify, cosine, next_token_loss, set_rate, vision_layers

_LENS_LAYER = 1  # the lens reads the output of this layer


class Alignment(nn.Module):
    """The loss that keeps image tokens aligned with words.

    It classifies image tokens, as the language model reads them, against the embeddings of the words. A linear head
    also reads the place of their object; without it, "left to right" is learned late.
    """

    def __init__(self, tokenizer, width: int):
        super().__init__()
        self.none = nn.Parameter(torch.randn(2, width))
        self.place = nn.Linear(width, 2)
        self.words = [
            torch.tensor([tokenizer(word, add_special_tokens=False).input_ids[0] for word in group])
            for group in (SHAPES, COLORS)
        ]

    def loss(self, image: torch.Tensor, embeddings: torch.Tensor, targets: PatchTargets) -> torch.Tensor:
        image = image.float()
        inside = ~targets.place[..., 0].isnan()
        total = F.smooth_l1_loss(self.place(image)[inside], targets.place[inside], beta=0.1)
        image = F.normalize(image, dim=-1)
        table = F.normalize(embeddings.float(), dim=-1)
        none = F.normalize(self.none, dim=-1)
        for i, target in enumerate((targets.shape, targets.color)):
            classes = torch.cat([none[i : i + 1], table[self.words[i]]])
            total = total + classify(14 * (image @ classes.T), target)
        return total


class Trainer:  # long: one training run, its stages in order
    """A training run with its model; `run` goes through the stages."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        torch.manual_seed(args.seed)
        self.rng = np.random.default_rng(args.seed + 1)
        self.processor = build_processor()
        tokenizer = self.processor.tokenizer
        self.model = build_model(tokenizer)
        self.model.set_attn_implementation("eager")
        self.vision = self.model.model.vision_tower
        self.projector = self.model.model.multi_modal_projector
        self.language = self.model.model.language_model
        self.batches = BatchMaker(tokenizer)
        config: Any = self.model.config
        self.heads = PatchHeads(config.vision_config.hidden_size)
        self.alignment = Alignment(tokenizer, config.text_config.hidden_size)
        self.start = time.monotonic()
        if args.compile:
            for layer in [*self.language.layers, *vision_layers(self.vision)]:
                layer.compile()

    def log(self, *words: object) -> None:
        print(f"[{time.monotonic() - self.start:7.1f} s]", *words, flush=True)

    def run(self) -> None:
        if self.args.start:
            self.model.load_state_dict(LlavaForConditionalGeneration.from_pretrained(self.args.start).state_dict())
        else:
            self.train_vision(self.args.vision_steps)
            self.train_words(self.args.word_steps)
            self.train_answers(self.args.steps)
        self.train_contexts(self.args.context_steps)
        self.train_compressed(self.args.compressed_steps)
        self.log("held-out", self.accuracy(24))
        self.save()

    def image_tokens(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the outputs of the vision tower and of the projector, both [B, 144, width]."""
        hidden = self.vision(pixels).last_hidden_state[:, 1:]
        return hidden, self.projector(hidden)

    def train_vision(self, steps: int) -> None:
        optimizer = adamw([self.vision, self.heads], 1e-3, 0.02)
        for step in range(steps):
            set_rate(optimizer, 1e-3 * cosine(step, steps, 50))
            pixels, targets = vision_batch(self.rng, 64)
            with torch.autocast("cpu", torch.bfloat16):
                hidden = self.vision(pixels).last_hidden_state[:, 1:]
            loss = self.heads.loss(hidden, targets)
            self.update(optimizer, loss)
            if step % 100 == 0 or step == steps - 1:
                with torch.no_grad():
                    shown = targets.shape > 0
                    right = self.heads.shape(hidden.float()).argmax(-1)[shown] == targets.shape[shown]
                self.log(f"vision {step} loss {loss.item():.3f} patch shape accuracy {right.float().mean():.3f}")

    def train_words(self, steps: int) -> None:
        embeddings = self.language.embed_tokens
        optimizer = adamw([self.vision, self.projector, embeddings, self.alignment], 2e-3, 0.02)
        for step in range(steps):
            set_rate(optimizer, 2e-3 * cosine(step, steps, 20))
            pixels, targets = vision_batch(self.rng, 64)
            with torch.autocast("cpu", torch.bfloat16):
                _, image = self.image_tokens(pixels)
            loss = self.alignment.loss(image, embeddings.weight, targets)
            self.update(optimizer, loss)
            if step % 40 == 0 or step == steps - 1:
                self.log(f"words {step} loss {loss.item():.3f}")

    def train_answers(self, steps: int) -> None:
        args = self.args
        optimizer = adamw([self.model, self.alignment], args.rate, 0.05)
        average = None
        for step in range(steps):
            progress = step / steps
            set_rate(optimizer, args.rate * cosine(step, steps, 100))
            most = 2 if progress < 0.12 else 3 if progress < 0.24 else 4
            batch = self.batches.draw(self.rng, args.batch, most, Mix(args.chained, args.prefixed))
            visible = self.hide_picture(batch, args.blind_questions, args.blind_later)
            with torch.autocast("cpu", torch.bfloat16):
                logits, image, lens = self.forward(batch, visible)
            answers = next_token_loss(logits, batch.labels)
            loss = answers + 0.2 * self.alignment.loss(image, self.language.embed_tokens.weight, batch.targets)
            weight = 0.5 * min(1, max(0, 2 * (1 - progress / 0.6)))
            if weight > 0:
                spoken = F.log_softmax(lens[batch.last].float(), -1)
                loss = loss - weight * spoken.gather(1, batch.keywords).mean()
            self.update(optimizer, loss)
            average = answers.item() if average is None else 0.98 * average + 0.02 * answers.item()
            if step % 200 == 0:
                self.log(f"answers {step} ({progress:.0%}) loss {average:.4f}", self.accuracy(3))

    def train_contexts(self, steps: int) -> None:
        mix = Mix(chained=0.25, prefixed=0.6, describe_turns=4, later="by object")
        self.train_later_turns("contexts", steps, self.model, mix)

    def train_compressed(self, steps: int) -> None:
        mix = Mix(chained=0.25, prefixed=0.6, describe_turns=4, later="everything", again=self.args.again)
        self.train_later_turns("compressed", steps, self.language, mix)

    def train_later_turns(self, stage: str, steps: int, trained: nn.Module, mix: Mix) -> None:
        args = self.args
        optimizer = adamw([trained], args.rate / 4, 0.05)
        average = None
        for step in range(steps):
            set_rate(optimizer, args.rate / 4 * cosine(step, steps, 50))
            batch = self.batches.draw(self.rng, args.batch, 4, mix)
            visible = self.hide_picture(batch, args.blind_questions, args.blind_later)
            if stage == "compressed":
                visible = self.compress(batch, visible)
            with torch.autocast("cpu", torch.bfloat16):
                logits, _, _ = self.forward(batch, visible)
            answers = next_token_loss(logits, batch.labels)
            self.update(optimizer, answers)
            average = answers.item() if average is None else 0.98 * average + 0.02 * answers.item()
            if step % 200 == 0:
                self.log(f"{stage} {step} ({step / steps:.0%}) loss {average:.4f}", self.accuracy(3))

    def compress(self, batch: Batch, visible: torch.Tensor) -> torch.Tensor:
        """Hide the image tokens that a compressed context drops, and return the mask of each layer, [layers, B, L, L].

        This concerns samples that ask for a description first: their later turns, and the tokens of the description
        itself, which follow from the same words. They see a random number of the image tokens that the description
        attended to most from the whole image, layer by layer. A quarter of the turns sees all tokens, and a tenth sees
        none.
        """
        rank = self.attended(batch, visible).argsort(-1, descending=True).argsort(-1)
        each = visible.expand(len(rank), *visible.shape).clone()
        image = slice(self.batches.image_start, self.batches.image_start + NUM_IMAGE_TOKENS)
        for b, tasks in enumerate(batch.tasks):
            for turn in range(1, len(tasks) + 1) if tasks[-1].startswith("then") else ():
                draw = self.rng.random()
                kept = 1.0 if draw < 0.25 else 0.0 if draw < 0.35 else 0.01 ** self.rng.random()
                seen = rank[:, b] < math.ceil(kept * NUM_IMAGE_TOKENS)
                rows = batch.turn[b] == turn
                if turn == 1:
                    rows = rows & (batch.labels[b] != IGNORE)  # a context keeps what the asking words saw
                each[:, b, rows, image] &= seen[:, None]
        return each

    @torch.no_grad()
    def attended(self, batch: Batch, visible: torch.Tensor) -> torch.Tensor:
        """Return the first answer's attention weights on each image token, [layers, B, 144].

        They are means over the heads and over the rows of the answer.
        """
        rows = (batch.turn == 1) & (batch.labels != IGNORE) & (batch.labels != self.processor.tokenizer.eos_token_id)
        image = slice(self.batches.image_start, self.batches.image_start + NUM_IMAGE_TOKENS)
        share = rows / rows.sum(1, keepdim=True).clamp_min(1)
        found: list[torch.Tensor] = []

        def take(module: nn.Module, args: tuple, output: tuple) -> None:
            alpha = output[1].float().mean(1)[..., image]
            found.append((share[..., None] * alpha).sum(1))  # a matrix product would run in bfloat16 here

        handles = [layer.self_attn.register_forward_hook(take) for layer in self.language.layers]
        try:
            with torch.autocast("cpu", torch.bfloat16):
                self.forward(batch, visible, whole=True)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack(found)

    def hide_picture(self, batch: Batch, share: float, later: float) -> torch.Tensor:
        """Return `visible` with the image hidden from the question words of random samples.

        Args:
            batch: The batch.
            share: The share of the samples.
            later: The share of the samples that ask for a description first.
        """
        shares = torch.tensor([later if tasks[-1].startswith("then") else share for tasks in batch.tasks])
        blind = batch.question & (torch.rand(len(batch.question)) < shares)[:, None]
        return batch.visible & ~(blind[:, :, None] & (batch.input_ids == self.batches.image_id)[:, None, :])

    def forward(
        self, batch: Batch, visible: torch.Tensor, whole: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run a forward pass.

        Args:
            batch: The batch.
            visible: The attention mask, [B, L, L], or one per layer, [layers, B, L, L].
            whole: Whether to run the layers without compilation, so that hooks inside them are called.

        Returns:
            The logits [B, L, V], the image tokens [B, 144, d], and the logits of the lens [B, L, V].
        """
        _, image = self.image_tokens(batch.pixel_values)
        hidden = self.language.embed_tokens(batch.input_ids)
        slots = (batch.input_ids == self.batches.image_id)[..., None].expand_as(hidden)
        hidden = hidden.masked_scatter(slots, image.to(hidden.dtype))
        masks = torch.zeros(visible.shape, dtype=torch.bfloat16).masked_fill(~visible, -1e9).unsqueeze(-3)
        rotary = self.language.rotary_emb(hidden, batch.position_ids)
        lens = hidden
        for i, layer in enumerate(self.language.layers):
            run = layer.forward if whole else layer
            mask = masks if visible.ndim == 3 else masks[i]
            hidden = run(hidden, attention_mask=mask, position_embeddings=rotary)
            if i == _LENS_LAYER:
                lens = hidden
        read = lambda h: self.model.lm_head(self.language.norm(h))  # noqa: E731
        return read(hidden), image, read(lens)

    def update(self, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        loss.backward()
        for group in optimizer.param_groups:
            group_parameters = [p for p in group["params"] if p.grad is not None]
            nn.utils.clip_grad_norm_(group_parameters, 1.0)
        optimizer.step()
        self.model.zero_grad(set_to_none=True)
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def accuracy(self, batches: int) -> dict[str, float]:
        """Return the share of held-out answers with every token right under teacher forcing, by task."""
        self.model.eval()
        rng = np.random.default_rng(10**6)
        right: dict[str, list[bool]] = {}
        for i in range(batches):
            mix = Mix(chained=float(i % 3 == 1), prefixed=float(i % 3 == 2), describe_turns=4)
            batch = self.batches.draw(rng, self.args.batch, 4, mix)
            with torch.autocast("cpu", torch.bfloat16):
                logits, _, _ = self.forward(batch, batch.visible)
            hit = (logits[:, :-1].argmax(-1) == batch.labels[:, 1:]) | (batch.labels[:, 1:] == IGNORE)
            for b, tasks in enumerate(batch.tasks):
                for turn, task in enumerate(tasks, 1):
                    right.setdefault(task, []).append(bool(hit[b][batch.turn[b, 1:] == turn].all()))
        self.model.train()
        return {task: round(float(np.mean(hits)), 3) for task, hits in sorted(right.items())}

    def save(self) -> None:
        self.model.set_attn_implementation("sdpa")
        model: Any = self.model
        save(model.to(torch.bfloat16), self.processor, self.args.out)
        size = sum(entry.stat().st_size for entry in os.scandir(self.args.out))
        self.log(f"saved to {self.args.out}: {size / 2**20:.1f} MiB")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options of a training run, from the command line by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for the weights and the processor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vision-steps", type=int, default=1500, help="batches of 64 for the vision tower")
    parser.add_argument("--word-steps", type=int, default=150, help="batches of 64 for projector and words")
    parser.add_argument("--steps", type=int, default=6000, help="batches for the whole model's answers")
    parser.add_argument("--context-steps", type=int, default=500, help="batches for parts of pictures at random")
    parser.add_argument("--compressed-steps", type=int, default=500, help="batches for what was attended to")
    parser.add_argument("--start", default=None, help="weights after the third stage: run the last two alone")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3, help="AdamW's learning rate")
    parser.add_argument("--chained", type=float, default=0.3, help="share of samples that are conversations")
    parser.add_argument("--prefixed", type=float, default=0.35, help="share that ask for a description first")
    parser.add_argument("--again", type=float, default=0.5, help="share that ask for a description again, last stage")
    parser.add_argument("--blind-questions", type=float, default=0.8, help="share of blind question words")
    parser.add_argument("--blind-later", type=float, default=0.5, help="the same after a description was asked for")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="skip torch.compile")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    os.makedirs(args.out, exist_ok=True)
    Trainer(args).run()


if __name__ == "__main__":
    main()
