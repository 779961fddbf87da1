"""Train the embedded video model: `python -m mllm_fast.shapes.train_clips --out FOLDER`.

It begins with the weights of the embedded model for pictures. The vision tower sees smaller frames, for which a part of
its position embeddings is taken; words that are new are drawn at random. Then the whole model learns to answer
questions about clips of four to eight frames, of which each is an image behind its number.

As in `train`, image tokens stay aligned with the words for what they show, and early in the training the last prompt
token after layer 2 must decode to the word that is asked about. After layer 4, the tokens of an object that appears
must decode to the half in which it does, since that answer is no word that a picture shows. Attention is trained too:
from layer 2 on the last prompt token is kept from other image tokens than those that show what is asked about, and one
head of layer 5 learns to point to these and to write the answer. Most question words cannot see the clip, and a part of
the questions and answers sees what is asked about and a random part of the rest. So the model reads an answer from the
moment and the object that show it, and figures of maps and knockouts follow in part from this design.

The weights in the package were made in seven runs, each with `--start` on the result of the one before: `--steps 1000
--point 0`, of which the weights after 500 steps were kept; `--steps 500 --rate 7e-4 --seed 1`, when a head pointed and
nothing else was asked of attention; `--steps 300 --rate 6e-4 --seed 2`, when it did not write yet; `--steps 220
--rate 8e-4 --seed 3`; `--steps 140 --rate 5e-4 --seed 4`; and, with `--float32`, `--steps 600 --rate 7e-4 --seed 5
--moves 0.4` and `--steps 400 --rate 7e-4 --seed 6 --moves 0.2`.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ..core.assets import SHAPES_WEIGHTS
from .batches import GRID, IGNORE
from .build import CLIP_GRID, build_clip_model, build_clip_processor, build_tokenizer, save
from .clip_batches import ClipBatch, ClipBatches
from .scenes import COLORS, SHAPES
from .training import adamw, classify, cosine, next_token_loss, set_rate, vision_layers

_LENS_LAYER = 1  # the lens reads the output of this layer
_FIRST_READER = 1  # from this layer on last prompt tokens look at what is asked about
_POINT_LAYER = 4  # a head of this layer points
_HALF_LAYER = 3  # after this layer, objects that appear decode to the half in which they do
_HELD_OUT = 10**6


class Alignment(nn.Module):
    """The loss that keeps image tokens aligned with words: each against the embeddings of shapes and colours."""

    def __init__(self, tokenizer, width: int):
        super().__init__()
        self.none = nn.Parameter(torch.randn(2, width))
        self.words = [
            torch.tensor([tokenizer(word, add_special_tokens=False).input_ids[0] for word in group])
            for group in (SHAPES, COLORS)
        ]

    def loss(self, image: torch.Tensor, embeddings: torch.Tensor, batch: ClipBatch) -> torch.Tensor:
        image, table = F.normalize(image.float(), dim=-1), F.normalize(embeddings.float(), dim=-1)
        none = F.normalize(self.none, dim=-1)
        total = torch.zeros(())
        for i, target in enumerate((batch.shape, batch.color)):
            classes = torch.cat([none[i : i + 1], table[self.words[i]]])
            total = total + classify(14 * (image @ classes.T), target)
        return total


class ClipTrainer:
    """A training run with its model."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        torch.manual_seed(args.seed)
        self.rng = np.random.default_rng(args.seed + 1)
        self.processor = build_clip_processor()
        tokenizer = self.processor.tokenizer
        self.model = build_clip_model(tokenizer)
        if args.start:
            self.model.load_state_dict(LlavaForConditionalGeneration.from_pretrained(args.start).state_dict())
        else:
            begin_with_pictures(self.model, tokenizer)
        self.model.set_attn_implementation("eager")
        self.vision = self.model.model.vision_tower
        self.projector = self.model.model.multi_modal_projector
        self.language = self.model.model.language_model
        self.batches = ClipBatches(tokenizer)
        config: Any = self.model.config
        self.alignment = Alignment(tokenizer, config.text_config.hidden_size)
        self.began = time.monotonic()
        if args.compile:
            for layer in [*self.language.layers, *vision_layers(self.vision)]:
                layer.compile(dynamic=True)

    def log(self, *words: object) -> None:
        print(f"[{time.monotonic() - self.began:7.1f} s]", *words, flush=True)

    def run(self) -> None:
        args = self.args
        frozen = int(args.steps * args.frozen)
        optimizer = adamw([self.model, self.alignment], args.rate, 0.05)
        average = None
        for step in range(args.steps):
            progress = step / args.steps
            set_rate(optimizer, args.rate * cosine(step, args.steps, 50))
            most = 2 if progress < 0.1 else 3
            seen = 1.0 if progress < 0.1 else args.seen
            batch = self.batches.draw(self.rng, args.batch, most, seen, args.blind, args.moves)
            self.vision.requires_grad_(step >= frozen)
            with self.autocast():
                logits, image, lens, halves, looked = self.forward(batch)
            answers = next_token_loss(logits, batch.labels)
            loss = answers + 0.2 * self.alignment.loss(image, self.language.embed_tokens.weight, batch)
            weight = 0.3 * min(1, max(0, 2 * (1 - progress / 0.4)))
            if weight > 0:
                spoken = F.log_softmax(lens[batch.last].float(), -1)
                loss = loss - weight * spoken.gather(1, batch.keywords).mean()
            if halves.numel():
                loss = loss + 0.1 * classify(halves, batch.half[batch.half != IGNORE][None])
            if looked.numel():
                loss = loss - args.point * looked.mean()
            self.update(optimizer, loss)
            average = answers.item() if average is None else 0.98 * average + 0.02 * answers.item()
            if step % 100 == 0:
                self.log(f"step {step} ({progress:.0%}) loss {average:.4f}", self.accuracy(min(3, args.held_out)))
            if step % 500 == 499:
                self.save()
        self.log("held-out", self.accuracy(args.held_out))
        self.save()

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=not self.args.float32)

    def forward(self, batch: ClipBatch) -> tuple[torch.Tensor, ...]:
        """Run a forward pass.

        Returns:
            The logits [B, L, V], the image tokens [B * frames, 64, d], the logits of the lens [B, L, V], those of the
            objects that appear, [1, tokens, V], and what `looked` returns, summed over the layers.
        """
        image = self.projector(self.vision(batch.pixel_values).last_hidden_state[:, 1:])
        hidden = self.language.embed_tokens(batch.input_ids)
        slots = (batch.input_ids == self.batches.image_id)[..., None].expand_as(hidden)
        hidden = hidden.masked_scatter(slots, image.to(hidden.dtype))
        mask = torch.zeros(batch.visible.shape, dtype=torch.bfloat16).masked_fill(~batch.visible, -1e9)[:, None]
        rotary = self.language.rotary_emb(hidden, batch.position_ids)
        lens = appeared = hidden
        looked: list[torch.Tensor] = []
        for i, layer in enumerate(self.language.layers):
            if i >= _FIRST_READER:
                looked.append(self.looked(batch, layer, hidden, rotary, i == _POINT_LAYER))
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
            if i == _LENS_LAYER:
                lens = hidden
            if i == _HALF_LAYER:
                appeared = hidden[slots[..., 0]][batch.half.flatten() != IGNORE]
        read = lambda h: self.model.lm_head(self.language.norm(h))  # noqa: E731
        return read(hidden), image, read(lens), read(appeared).float()[None], torch.stack(looked).sum(0)

    def looked(self, batch: ClipBatch, layer: Any, hidden: torch.Tensor, rotary: Any, points: bool) -> torch.Tensor:
        """Return how well a layer's last prompt tokens look at what is asked about, [n].

        It is log of the attention that is not on other image tokens, a mean over the heads. For the layer that points,
        log of its first head's attention to what is asked about is added, and log p of the answer by what that head
        writes, under the statistics of the row.

        Args:
            batch: The batch.
            layer: The layer.
            hidden: What it reads, [B, L, d].
            rotary: The rotary embedding of the positions.
            points: Whether the layer's first head points.
        """
        attention = layer.self_attn
        width, lead = attention.head_dim, hidden.shape[:2]
        normed = layer.input_layernorm(hidden)
        query, key = (
            part(normed).view(*lead, -1, width).transpose(1, 2) for part in (attention.q_proj, attention.k_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        rows, places = batch.last.nonzero()[:, 0], (batch.input_ids[0] == self.batches.image_id).nonzero()[:, 0]
        query = query.transpose(1, 2)[batch.last][:, :, None].float()  # [n, H, 1, D]
        scores = (query @ key[rows].float().transpose(2, 3))[:, :, 0] / width**0.5
        alpha = torch.softmax(scores.masked_fill(~batch.visible[batch.last][:, None], -1e9), -1)
        shown = alpha[..., places]
        beside = (shown * ~batch.evidence[:, None]).sum(-1)
        found = (1 - beside).clamp_min(1e-3).log().mean(1)
        if points:
            value = attention.v_proj(normed)[rows, :, :width].float()
            write = (alpha[:, :1] @ value)[:, 0] @ attention.o_proj.weight[:, :width].float().T
            scale = hidden[batch.last].detach().float().square().mean(-1, keepdim=True).rsqrt()
            said = self.model.lm_head.weight.float() @ (self.language.norm.weight.float() * write * scale).T
            answers = batch.labels[rows, batch.last.nonzero()[:, 1] + 1]
            spoken = torch.log_softmax(said.T, -1).gather(1, answers[:, None])[:, 0]
            found = found + (shown[:, 0] * batch.evidence).sum(-1).clamp_min(1e-6).log() + spoken
        return found

    def update(self, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        loss.backward()
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_([p for p in group["params"] if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def accuracy(self, batches: int) -> dict[str, float]:
        """Return the share of held-out answers with every token right under teacher forcing, by task."""
        self.model.eval()
        rng = np.random.default_rng(_HELD_OUT)
        right: dict[str, list[bool]] = {}
        for _ in range(batches):
            batch = self.batches.draw(rng, self.args.batch, 3, 1.0, 0.0)
            with self.autocast():
                logits, *_ = self.forward(batch)
            hit = (logits[:, :-1].argmax(-1) == batch.labels[:, 1:]) | (batch.labels[:, 1:] == IGNORE)
            for b, tasks in enumerate(batch.tasks):
                for turn, task in enumerate(tasks, 1):
                    right.setdefault(task, []).append(bool(hit[b][batch.turn[b, 1:] == turn].all()))
        self.model.train()
        return {task: round(float(np.mean(hits)), 3) for task, hits in sorted(right.items())}

    def save(self) -> None:
        implementation = "eager"
        self.model.set_attn_implementation("sdpa")
        copy: Any = build_clip_model(self.processor.tokenizer)
        copy.load_state_dict(self.model.state_dict())
        save(copy.to(torch.bfloat16), self.processor, self.args.out)
        self.model.set_attn_implementation(implementation)
        size = sum(entry.stat().st_size for entry in os.scandir(self.args.out))
        self.log(f"saved to {self.args.out}: {size / 2**20:.1f} MiB")


def begin_with_pictures(model: LlavaForConditionalGeneration, tokenizer) -> None:
    """Give a video model the weights of the embedded model, with those of known words and of a part of the patches."""
    before = LlavaForConditionalGeneration.from_pretrained(SHAPES_WEIGHTS, dtype=torch.float32).state_dict()
    known = build_tokenizer().get_vocab()
    rows = {tokenizer.convert_tokens_to_ids(word): old for word, old in known.items()}
    weights = model.state_dict()
    for name, new in weights.items():
        old = before[name]
        if name.endswith("position_embedding.weight"):
            patches = old[1:].view(GRID, GRID, -1)[:CLIP_GRID, :CLIP_GRID]
            new.copy_(torch.cat([old[:1], patches.flatten(0, 1)]))
        elif new.shape == old.shape:
            new.copy_(old)
        else:  # word embeddings
            new[list(rows)] = old[list(rows.values())]
    model.load_state_dict(weights)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options of a training run, from the command line by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for the weights and the processor")
    parser.add_argument("--start", default=None, help="weights of an earlier run; by default those for pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--rate", type=float, default=1e-3, help="AdamW's learning rate")
    parser.add_argument("--frozen", type=float, default=0.1, help="share of the steps that leave the tower as it is")
    parser.add_argument("--seen", type=float, default=0.5, help="share of the questions that see the whole clip")
    parser.add_argument("--blind", type=float, default=0.8, help="share of the questions whose words see no image")
    parser.add_argument("--point", type=float, default=0.1, help="weight of the attention to what is asked about")
    parser.add_argument(
        "--moves", type=float, default=0.0, help="share of the clips drawn for the question of what moves"
    )
    parser.add_argument("--float32", action="store_true", help="compute in float32: for processors without bfloat16")
    parser.add_argument("--held-out", type=int, default=16, help="batches that the accuracy at the end is over")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="skip torch.compile")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    os.makedirs(args.out, exist_ok=True)
    ClipTrainer(args).run()


if __name__ == "__main__":
    main()
