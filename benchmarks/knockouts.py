"""What do knockouts and streamed explanations cost end to end? `python benchmarks/knockouts.py`.

Generation: 32 tokens from a picture with a LLaVA of random weights (16 layers of d = 1,024, 16 heads, 576 image
tokens), image -> query and image -> generated knocked out in all layers, against transformers' own generation with SDPA
and nothing knocked out. The gate: the same tokens as under eager attention with the additive mask.

Streaming: the embedded model describes pictures token by token; every token is explained as it appears (all heads,
the ten best heads' positions, the heat map), against the same stream without explanations, and against `generate`.
The gate: the tokens are those of `generate`.

Contenders run in turn; figures are medians; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from harness import in_turn, machine, median, write_result
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import mllm_fast as mf
from mllm_fast.shapes.build import CHAT_TEMPLATE, build_tokenizer
from mllm_fast.shapes.scenes import generate_scene

TOKENS = 32
RULES = [mf.Knockout("image", "query"), mf.Knockout("image", "generated")]


def random_llava() -> mf.VLM:
    """24 x 24 image tokens; the vision tower is a single small layer, for it is not what is measured."""
    tokenizer = build_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=192, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=2752,
        num_hidden_layers=16,
        num_attention_heads=16,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None  # always all the tokens
    images = CLIPImageProcessorPil(size={"height": 192, "width": 192}, do_center_crop=False)
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    return mf.VLM(model, processor)


@contextmanager
def masked_eager(vlm: mf.VLM, layout: mf.TokenLayout) -> Iterator[None]:
    """Eager attention with the additive mask of arXiv 2411.17491, equation 3, for RULES in every layer."""
    image, last = layout.positions("image"), int(layout.positions("image")[-1])

    def close(module, args, kwargs):
        mask = kwargs["attention_mask"].clone()
        rows, keys = mask.shape[-2:]
        closed = torch.arange(keys - rows, keys) > last  # the query and what is generated
        block = torch.zeros(rows, keys, dtype=torch.bool)
        block[closed.nonzero(), image] = True
        kwargs["attention_mask"] = mask.masked_fill(block, torch.finfo(mask.dtype).min)
        return args, kwargs

    vlm.model.set_attn_implementation("eager")
    with ExitStack() as stack:
        stack.callback(vlm.model.set_attn_implementation, "sdpa")
        for layer in vlm.text.layers:
            hook = layer.self_attn.register_forward_pre_hook(close, with_kwargs=True)
            stack.callback(hook.remove)
        yield


def generation(rounds: int) -> dict:
    vlm = random_llava()
    picture, question = generate_scene(np.random.default_rng(0)).image, "describe the image."

    def plain() -> mf.Answer:
        return vlm.generate(picture, question, max_new_tokens=TOKENS)

    def knocked_out() -> mf.Answer:
        return vlm.generate(picture, question, knockout=RULES, max_new_tokens=TOKENS)

    ours = knocked_out()
    with masked_eager(vlm, ours.layout):
        expected = plain()
    if ours.token_ids != expected.token_ids or len(ours.token_ids) != TOKENS:
        raise SystemExit(f"knocked out {ours.token_ids}, eager {expected.token_ids}: no figures for a wrong answer")
    times = in_turn({"SDPA, nothing knocked out": plain, "image knocked out": knocked_out}, rounds)
    ms = {name: median(seconds) * 1e3 for name, seconds in times.items()}
    ratio = median([a / b for a, b in zip(*reversed(times.values()), strict=True)])
    return {"sequence": len(ours.input_ids), "ms": ms, "knocked_out_over_plain": ratio}


def streaming(rounds: int) -> dict:
    vlm = mf.VLM.from_pretrained("shapes", device="cpu")
    rng = np.random.default_rng(5)
    ways: dict[str, list[float]] = {"generate": [], "stream": [], "stream, explained": []}
    for i in range(rounds + 2):
        picture, question = generate_scene(rng).image, "describe the image."
        said = vlm.generate(picture, question)
        for name in ways:
            start = time.perf_counter()
            if name == "generate":
                ids = vlm.generate(picture, question).token_ids
            else:
                ids = []
                for step in vlm.stream(picture, question, explain=name == "stream, explained"):
                    ids.append(step.token_id)
                    if name == "stream, explained":
                        step.heatmap()
            seconds = time.perf_counter() - start
            if ids != said.token_ids:
                raise SystemExit(f"{name} gave {ids}, generate {said.token_ids}: no figures for a wrong stream")
            if i >= 2:
                ways[name].append(seconds / (len(ids) + 1))  # the end of the answer is a token too
    ratio = median([a / b for a, b in zip(ways["stream, explained"], ways["stream"], strict=True)])
    against = median([a / b for a, b in zip(ways["stream, explained"], ways["generate"], strict=True)])
    ms = {name: median(seconds) * 1e3 for name, seconds in ways.items()}
    return {"ms_a_token": ms, "explained_over_stream": ratio, "explained_over_generate": against}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None, help="write the JSON line here too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result: dict = {"benchmark": "knockouts", "machine": machine(), "rounds": args.rounds}
    result["generation"] = found = generation(args.rounds)
    for name, ms in found["ms"].items():
        print(f"{TOKENS} tokens, {name}: {ms:.0f} ms")
    print(f"image knocked out over plain SDPA: {found['knocked_out_over_plain']:.2f}")
    result["streaming"] = found = streaming(4 * args.rounds)
    for name, ms in found["ms_a_token"].items():
        print(f"a token, {name}: {ms:.2f} ms")
    print(
        f"explained over the plain stream: {found['explained_over_stream']:.2f};"
        f" over generate: {found['explained_over_generate']:.2f}"
    )
    print(json.dumps(result))
    write_result(args.out, result)


if __name__ == "__main__":
    main()
