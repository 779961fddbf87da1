"""Attention knockout by the definition (arXiv 2411.17491, equation 3): the model's own eager attention, and a mask of
0 and -inf added to that of each layer. Knows nothing of plans, segment ids and tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import tiny
import torch
from torch import Tensor

import mllm_fast as mf
from mllm_fast.core.layout import TokenLayout

ROOM = 64  # tokens after the longest prompt


class Rule(NamedTuple):
    """A knockout, its layers as numbers too."""

    source: str | tuple[int, ...]
    target: str | tuple[int, ...]
    layers: str | tuple[int, ...]
    numbers: tuple[int, ...]

    @property
    def knockout(self) -> mf.Knockout:
        return mf.Knockout(self.source, self.target, self.layers)


def layer_sets(count: int) -> list[tuple[str, tuple[int, ...]]]:
    """All layers, from each layer on, and all but the middle half, as text and as numbers."""
    every = range(count)
    middle = every[count // 4 : count // 4 + count // 2]
    later = [(f"from {i}", tuple(every[i:])) for i in every[1:]]
    around = f"except {middle[0]}-{middle[-1]}", tuple(i for i in every if i not in middle)
    return [("all", tuple(every)), *later, around]


def image_rules(count: int) -> list[Rule]:
    """image -> generated, query and both, in each of the layer sets."""
    targets = ("generated", "query", "query+generated")
    return [Rule("image", target, *layers) for target in targets for layers in layer_sets(count)]


def knockouts(rules: Sequence[Rule]) -> list[mf.Knockout]:
    return [rule.knockout for rule in rules]


def members(layout: TokenLayout, tokens: str | Sequence[int], length: int) -> Tensor:
    """The positions of a set as bool [length]."""
    inside = torch.zeros(length, dtype=torch.bool)
    if not isinstance(tokens, str):
        inside[list(tokens)] = True
        return inside
    for name in tokens.split("+"):
        if name == "generated":
            inside[layout.prompt_length :] = True
        else:
            inside[layout.segments[name]] = True
    return inside


def additive(
    rules: Sequence[Rule], layer: int, layouts: Sequence[TokenLayout], padding: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """What equation 3 adds to the scores of one layer, [B, L, L] for sequences of up to L tokens."""
    length = max(layout.prompt_length + pad for layout, pad in zip(layouts, padding, strict=True)) + ROOM
    mask = torch.zeros(len(layouts), length, length, dtype=dtype)
    for b, (layout, pad) in enumerate(zip(layouts, padding, strict=True)):
        for rule in rules:
            if layer in rule.numbers:
                source, target = (members(layout, one, length - pad) for one in (rule.source, rule.target))
                mask[b, pad:, pad:][target[:, None] & source[None]] = -torch.inf
    return mask


@contextmanager
def eager(
    vlm: mf.VLM, rules: Sequence[Rule], layouts: Sequence[TokenLayout], padding: Sequence[int] | None = None
) -> Iterator[None]:
    """Inside, the model runs on its eager attention under these rules; beams repeat each sequence."""
    padding = [0] * len(layouts) if padding is None else padding

    def add(layer: int):
        extra = additive(rules, layer, layouts, padding, vlm.model.dtype)

        def hook(module, args, kwargs):
            mask = kwargs["attention_mask"]
            rows, keys = mask.shape[-2:]
            mine = extra[:, keys - rows : keys, :keys].repeat_interleave(len(mask) // len(extra), 0)
            return args, kwargs | {"attention_mask": mask + mine[:, None].to(mask.device)}

        return hook

    layers = enumerate(vlm.text.layers)
    handles = [layer.self_attn.register_forward_pre_hook(add(i), with_kwargs=True) for i, layer in layers]
    try:
        with tiny.eager(vlm.model):
            yield
    finally:
        for handle in handles:
            handle.remove()


def dropped(ctx: mf.Context) -> list[Rule]:
    """What a compressed context leaves out, as rules for what follows its prefix: one a layer."""
    after = tuple(range(ctx.prefix_length, ctx.prefix_length + ROOM))
    rules = []
    for layer, positions in enumerate(ctx.positions.tolist()):
        gone = tuple(sorted({*range(ctx.prefix_length)} - {*positions}))
        rules += [Rule(gone, after, (layer,), (layer,))] if gone else []
    return rules


def whole(vlm: mf.VLM, pictures: list, prompt: str, more: list[int]) -> dict:
    """The model's inputs for a prefix, uncompressed, and the tokens that follow it."""
    inputs, _, _ = vlm.prompts.prepare([pictures], [prompt])
    ids = torch.cat([inputs["input_ids"][0], torch.tensor(more, dtype=torch.long)])[None]
    extra = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    if "mm_token_type_ids" in extra:
        extra["mm_token_type_ids"] = torch.nn.functional.pad(extra["mm_token_type_ids"], (0, len(more)))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **extra}


class Difference(NamedTuple):
    """An answer that differs: the two, and how far apart the two best logits lie where they part, in roundings of the
    largest logit there."""

    prompt: str
    ours: list[int]
    theirs: list[int]
    roundings: float


def differences(
    vlm: mf.VLM, pictures: list, prompts: list[str], rule: Rule, max_new_tokens: int = 32
) -> tuple[list[mf.Answer], list[Difference]]:
    """Greedy answers of one batch under a knockout, and those that are not eager attention's with the mask."""
    ours = vlm.generate(pictures, prompts, knockout=rule.knockout, max_new_tokens=max_new_tokens)
    inputs, layouts, padding = vlm.prompts.prepare([[picture] for picture in pictures], prompts)
    with torch.inference_mode(), eager(vlm, [rule], layouts, padding):
        out = vlm.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    found = []
    for b, (prompt, said) in enumerate(zip(prompts, ours, strict=True)):
        theirs = out[b, inputs["input_ids"].shape[1] :].tolist()
        while theirs and theirs[-1] in vlm.settings().stop_ids:
            theirs.pop()
        if theirs != said.token_ids:
            found.append(Difference(prompt, said.token_ids, theirs, _gap(vlm, pictures[b], prompt, rule, said, theirs)))
    return ours, found


def _gap(vlm: mf.VLM, picture, prompt: str, rule: Rule, said: mf.Answer, theirs: list[int]) -> float:
    common = 0
    while common < min(len(theirs), len(said.token_ids)) and theirs[common] == said.token_ids[common]:
        common += 1
    inputs, layouts, _ = vlm.prompts.prepare([[picture]], [prompt])
    with torch.inference_mode(), eager(vlm, [rule], layouts):
        out = vlm.model.generate(
            **inputs, max_new_tokens=common + 1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    logits = out.logits[common][0]
    best = logits.topk(2).values
    return float((best[0] - best[1]) / (logits.abs().max() * torch.finfo(logits.dtype).eps))
