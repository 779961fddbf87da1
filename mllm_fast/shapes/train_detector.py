"""Train the embedded detector from scratch: `python -m mllm_fast.shapes.train_detector --out FOLDER`.

Training has one stage and three losses. Every token that shows an object is trained to detect it:

- Boxes: The token predicts the box of the object (L1 and generalised IoU).
- Classes: The token gives a score to the queries that name the object (its colour and shape, its shape, its colour).
  The target is the overlap of the token's box with the object (quality focal loss, arXiv 2006.04388), so that the best
  box of an object has the highest score.
- Patches: Heads that are discarded after training read what each patch shows, from the vision embedding that words and
  boxes share. A large detector knows this from its contrastive training.

The last layer reads the embedding through noise, so that its output changes smoothly with the embedding. Some of the
images are blurred, noisy or partly hidden.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.corruptions import KINDS, degrade
from .batches import normalize, patch_targets
from .build import GRID, PATCH
from .detector import build_model, build_processor
from .scenes import CANVAS, COLORS, SHAPES, Scene, generate_scene
from .training import PatchHeads, adamw, cosine, set_rate

_PAIRS = [(color, shape) for color in COLORS for shape in SHAPES]
_UNKNOWN = ("dog", "tree", "house")  # words outside the vocabulary
_SHOWN = 0.2  # a token shows an object that covers at least this share of its pixels


def query_text(color: str | None, shape: str | None, rng: np.random.Generator) -> str:
    """Write a query in one of the ways people do; half of the time as "a photo of a red circle"."""
    words = " ".join(word for word in (color, shape or "object") if word)
    article = "an" if words[0] in "aeiou" and rng.random() < 0.5 else "a"
    bare = color if color and shape is None else words
    ways = (f"{article} {words}", f"an image of {article} {words}", bare, f"a photo of {bare}")
    return f"a photo of {article} {words}" if rng.random() < 0.5 else str(rng.choice(ways))


def all_queries(rng: np.random.Generator) -> list[str]:
    """Return a query for every pair of colour and shape, every shape, every colour, and one unknown word."""
    named = [*_PAIRS, *((None, shape) for shape in SHAPES), *((color, None) for color in COLORS)]
    return [query_text(color, shape, rng) for color, shape in named] + [f"a photo of a {rng.choice(_UNKNOWN)}"]


class Objects:
    """The training targets of each token in a batch.

    Attributes:
        boxes: The box of the token's object, centre and size in shares of the image, float32 [B, T, 4].
        queries: 1 for the queries of `all_queries` that name the object, otherwise 0, float32 [B, T, Q].
        shown: Marks tokens that show an object, bool [B, T].
        edge: Marks tokens that show too little of an object to decide, bool [B, T].
    """

    def __init__(self, scenes: list[Scene]):
        count, tokens = len(_PAIRS) + len(SHAPES) + len(COLORS) + 1, GRID * GRID
        self.boxes = torch.zeros(len(scenes), tokens, 4)
        self.queries = torch.zeros(len(scenes), tokens, count)
        self.shown = torch.zeros(len(scenes), tokens, dtype=torch.bool)
        self.edge = torch.zeros(len(scenes), tokens, dtype=torch.bool)
        for b, scene in enumerate(scenes):
            masks = np.stack([one.mask for one in scene.objects])
            cover = masks.reshape(-1, GRID, PATCH, GRID, PATCH).mean((2, 4)).reshape(len(masks), -1)
            self.shown[b] = torch.from_numpy(cover.max(0) >= _SHOWN)
            self.edge[b] = torch.from_numpy((cover.max(0) > 0) & (cover.max(0) < _SHOWN))
            owner = torch.from_numpy(cover.argmax(0))
            for i, one in enumerate(scene.objects):
                mine = self.shown[b] & (owner == i)
                left, top, right, bottom = (side / CANVAS for side in one.box)
                self.boxes[b, mine] = torch.tensor([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top])
                pair = _PAIRS.index((one.color, one.shape))
                shape = len(_PAIRS) + SHAPES.index(one.shape)
                color = len(_PAIRS) + len(SHAPES) + list(COLORS).index(one.color)
                queries = torch.zeros(count)
                queries[[pair, shape, color]] = 1.0
                self.queries[b, mine] = queries


class Trainer:
    """A training run with its detector."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        torch.manual_seed(args.seed)
        self.rng = np.random.default_rng(args.seed + 1)
        self.processor = build_processor()
        self.model: Any = build_model(self.processor.tokenizer)
        self.model.set_attn_implementation("eager")  # its backward pass is the fast one on a CPU
        self.vision = self.model.owlvit.vision_model
        width: Any = self.model.config.vision_config
        self.heads = PatchHeads(width.hidden_size)
        self.start = time.monotonic()
        if args.compile:
            for layer in self.vision.encoder.layers:
                layer.compile()

    def log(self, *words: object) -> None:
        print(f"[{time.monotonic() - self.start:7.1f} s]", *words, flush=True)

    def run(self) -> None:
        args = self.args
        optimizer = adamw([self.model, self.heads], args.rate, 0.05)
        average: Tensor | None = None
        for step in range(args.steps):
            set_rate(optimizer, args.rate * cosine(step, args.steps, 100))
            scenes = [generate_scene(self.rng, min_objects=1) for _ in range(args.batch)]
            losses = self.losses(scenes, self.pixels(scenes))
            (losses * torch.tensor([3.0, 5.0, 2.0, 0.3])).sum().backward()
            nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average = losses.detach() if average is None else 0.98 * average + 0.02 * losses.detach()
            if step % 100 == 0 or step == args.steps - 1:
                parts = zip(("classes", "boxes", "overlap", "patches"), average.tolist(), strict=True)
                self.log(f"step {step}", "  ".join(f"{name} {value:.4f}" for name, value in parts))
        self.save()

    def pixels(self, scenes: list[Scene]) -> Tensor:
        """Return the pixels of the scenes, some of them degraded."""
        shown = []
        for scene in scenes:
            if self.rng.random() < self.args.degraded:
                kind, strength = str(self.rng.choice(KINDS)), self.rng.random() * 0.6
                pixels = np.asarray(degrade(scene.image, kind, strength, self.rng))
                scene = Scene(pixels, scene.objects, scene.background)
            shown.append(scene)
        return normalize(shown)

    def losses(self, scenes: list[Scene], pixels: Tensor) -> Tensor:
        """Return the losses of classes, boxes (L1), boxes (1 - generalised IoU) and patches, [4]."""
        model, objects = self.model, Objects(scenes)
        texts = self.processor(text=all_queries(self.rng))
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.vision.pre_layernorm(self.vision.embeddings(pixels))
            *early, last = self.vision.encoder.layers
            for layer in early:
                hidden = layer(hidden, None)
            shared = hidden
            # with noise on its input, the output of the last layer changes smoothly with E
            noise = self.rng.random() * self.args.noise * hidden.detach().float().std((1, 2), keepdim=True)
            hidden = hidden + noise * torch.randn(hidden.shape)
            features = self.vision.post_layernorm(last(hidden, None))
            features = model.layer_norm(features[:, 1:] * features[:, :1])
            words = model.owlvit.text_model(**texts).pooler_output
            words = model.owlvit.text_projection(words)
            raw = model.box_head(features)
        logits, _ = model.class_predictor(features.float(), words.float().expand(len(scenes), -1, -1))
        boxes = (raw.float() + model.box_bias).sigmoid()
        shown = objects.shown
        wanted, got = objects.boxes[shown], boxes[shown]
        target = torch.zeros_like(logits)
        target[shown] = objects.queries[shown] * iou(got.detach(), wanted)[:, None]
        return torch.stack(
            [
                quality_focal(logits, target)[~objects.edge].sum() / shown.sum(),
                (got - wanted).abs().sum(-1).mean(),
                (1 - generalized_iou(got, wanted)).mean(),
                self.heads.loss(shared[:, 1:], patch_targets(scenes)),
            ]
        )

    def save(self) -> None:
        self.model.set_attn_implementation("sdpa")
        self.model.eval().to(torch.bfloat16).save_pretrained(self.args.out)
        self.processor.save_pretrained(self.args.out)
        size = sum(entry.stat().st_size for entry in os.scandir(self.args.out))
        self.log(f"saved to {self.args.out}: {size / 2**20:.1f} MiB")


def quality_focal(logits: Tensor, target: Tensor) -> Tensor:
    """Return the quality focal loss (arXiv 2006.04388, equation 3, beta 2) of each logit; targets are 0 to 1."""
    cross = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (target - logits.sigmoid()).square() * cross


def iou(left: Tensor, right: Tensor) -> Tensor:
    """Return the intersection over union [...] of boxes [..., 4], given as centre and size."""
    both, union, _ = _areas(left, right)
    return both / union


def generalized_iou(left: Tensor, right: Tensor) -> Tensor:
    """Return the generalised IoU (arXiv 1902.09630), -1 to 1, [...], of boxes [..., 4], given as centre and size."""
    both, union, hull = _areas(left, right)
    return both / union - (hull - union) / hull


def _areas(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the areas of two boxes' intersection, of their union, and of the box around both."""
    low_l, high_l = left[..., :2] - left[..., 2:] / 2, left[..., :2] + left[..., 2:] / 2
    low_r, high_r = right[..., :2] - right[..., 2:] / 2, right[..., :2] + right[..., 2:] / 2
    both = (torch.minimum(high_l, high_r) - torch.maximum(low_l, low_r)).clamp_min(0).prod(-1)
    hull = (torch.maximum(high_l, high_r) - torch.minimum(low_l, low_r)).prod(-1)
    return both, left[..., 2:].prod(-1) + right[..., 2:].prod(-1) - both, hull


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for the weights and the processor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3, help="AdamW's learning rate")
    parser.add_argument("--degraded", type=float, default=0.3, help="share of pictures made worse")
    parser.add_argument("--noise", type=float, default=0.6, help="most of it on E, in shares of its deviation")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="skip torch.compile")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    os.makedirs(args.out, exist_ok=True)
    Trainer(args).run()


if __name__ == "__main__":
    main()
