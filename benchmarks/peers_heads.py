"""Explaining one token, beside nnsight. `python benchmarks/peers_heads.py`, in an environment with nnsight too.

A tiny LLaVA of random weights (d = 128, 6 layers of 4 heads, 144 image tokens) answers one token to a question about a
picture. Each contender starts from the picture and the question:

- the pass alone: processor and one forward pass of transformers;
- nnsight: the same with what is needed read in a trace, and the scores of all heads in plain torch; with a vocabulary
  of 32,064 words also those of all positions of the ten best heads, with the weights of eager attention;
- ours: `VLM.explain` with one new token, `head_scores`, and with that vocabulary the scores of positions.

Gate: the scores agree. TransformerLens 4.3 takes no LLaVA with a config of its own and is left out.
Figures are medians of contenders in turn; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import in_turn, machine, median, write_result
from models import random_llava
from PIL import Image
from torch import Tensor

HEADS, BEST = 4, 10
QUESTION = "describe the image"


class Peer:
    """What a user of nnsight writes: everything is read in one trace, and scored in plain torch."""

    def __init__(self, vlm: Any, trace: Any, positions: bool):
        self.vlm, self.trace, self.positions = vlm, trace, positions
        model = vlm.model
        self.norm, self.head = model.model.language_model.norm, model.lm_head.weight
        self.outputs = [one.self_attn.o_proj.weight for one in model.model.language_model.layers]

    @torch.no_grad()
    def __call__(self) -> tuple[Tensor, Tensor | None]:
        inputs, _ = self.vlm.prepare(PICTURE, QUESTION)
        residual, writes, alphas, values = [], [], [], []
        with self.trace.trace(**inputs):
            for layer in self.trace.model.language_model.layers:
                residual.append(layer.input[0, -1].save())
                if self.positions:
                    values.append(layer.self_attn.v_proj.output[0].save())
                writes.append(layer.self_attn.o_proj.input[0, -1].save())
                if self.positions:
                    alphas.append(layer.self_attn.output[1][0, :, -1].save())
            final = self.trace.model.language_model.norm.input[0, -1].save()
            logits = self.trace.lm_head.output[0, -1].save()
        token = int(logits.argmax())
        scale = torch.rsqrt(final.square().mean() + self.norm.variance_epsilon) * self.norm.weight
        found = []
        for h, write, output in zip(residual, writes, self.outputs, strict=True):
            each = torch.einsum("hk,dhk->hd", write.unflatten(0, (HEADS, -1)), output.unflatten(1, (HEADS, -1)))
            found.append(self._increase(h, each, scale, token))
        heads = torch.stack(found)
        if not self.positions:
            return heads, None
        maps = []
        for index in heads.flatten().topk(BEST).indices.tolist():
            layer, head = divmod(index, HEADS)
            value = values[layer].unflatten(1, (HEADS, -1))[:, head] * alphas[layer][head][:, None]
            written = value @ self.outputs[layer].unflatten(1, (HEADS, -1))[:, head].T
            maps.append(self._increase(residual[layer], written, scale, token))
        return heads, torch.stack(maps).sum(0)

    def _increase(self, h: Tensor, writes: Tensor, scale: Tensor, token: int) -> Tensor:
        after = torch.log_softmax((h + writes) * scale @ self.head.T, -1)[:, token]
        return after - torch.log_softmax(h * scale @ self.head.T, -1)[token]


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None, help="write the JSON line here too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        from nnsight import NNsight
    except ImportError as error:
        raise SystemExit(f"left out: nnsight ({error}); pip install nnsight") from None
    result: dict = {"benchmark": "peers_heads", "machine": machine(), "rounds": args.rounds, "ms": {}}
    for vocab, positions in ((None, False), (32_064, True)):
        vlm = random_llava(128, 6, HEADS, 384, (12, 12), 512, vocab=vocab)
        eager = random_llava(128, 6, HEADS, 384, (12, 12), 512, vocab=vocab)
        if positions:
            eager.model.set_attn_implementation("eager")  # nnsight reads the weights of this one alone
        peer = Peer(eager, NNsight(eager.model), positions)

        @torch.no_grad()
        def alone(vlm=vlm) -> None:
            inputs, _ = vlm.prepare(PICTURE, QUESTION)
            vlm.model(**inputs)

        def ours(vlm=vlm, positions=positions) -> tuple[Tensor, Tensor | None]:
            ex = vlm.explain(PICTURE, QUESTION, max_new_tokens=1, do_sample=False)
            return ex.head_scores[0], ex.position_scores(0, BEST) if positions else None

        (heads, maps), (theirs, their_maps) = ours(), peer()
        off = float((heads - theirs).abs().max())
        if off > 1e-4 * max(1.0, float(theirs.abs().max())):
            raise SystemExit(f"scores differ by {off:.1e}: no figures for a wrong contender")
        if maps is not None and their_maps is not None:
            whole = maps if maps.ndim == 1 else maps.sum(0)
            off = float((whole[: len(their_maps)] - their_maps).abs().max())
            if off > 1e-3 * max(1.0, float(their_maps.abs().max())):
                raise SystemExit(f"positions differ by {off:.1e}: no figures for a wrong contender")
        runs = {"the pass alone": alone, "nnsight": peer, "ours": ours}
        took = {name: median(all_) * 1e3 for name, all_ in in_turn(runs, args.rounds, warm_up=3).items()}
        what = "heads, 56 words" if vocab is None else "heads and positions, 32,064 words"
        result["ms"][what] = took | {"nnsight over ours": took["nnsight"] / took["ours"]}
        print(f"{what}: " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in took.items()), end="; ")
        print(f"ours {took['nnsight'] / took['ours']:.2f} times as fast as nnsight", flush=True)
    print(json.dumps(result))
    write_result(args.out, result)


if __name__ == "__main__":
    main()
