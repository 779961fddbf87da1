"""One square, with or without tiles: LLaVA, InternVL, Idefics, Pixtral. See families.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tiny
import transformers as hf
from family_kit import (
    HALVES,
    PINPOINTS,
    SLIDING,
    SQUARE,
    VISION,
    Stand,
    family,
    finish,
    images,
    repeated,
    template,
    text,
    words,
)

from mllm_fast.models.loading import image_side


@family
def vipllava():
    model, processor = tiny.llava()
    like = model.config
    made = hf.VipLlavaConfig(
        vision_config=like.vision_config, text_config=like.text_config, vision_feature_layers=[-2, -1]
    )
    made.image_token_id = like.image_token_id
    made.image_token_index = like.image_token_id
    return finish(hf.VipLlavaForConditionalGeneration(made)), processor


@family
def internvl_qwen3():
    model, processor = tiny.internvl()
    like = model.config
    made = hf.InternVLConfig(
        vision_config=like.vision_config,
        text_config=hf.Qwen3Config(**text(len(processor.tokenizer), head_dim=16)),
        image_token_id=like.image_token_id,
        image_seq_length=16,
        downsample_ratio=0.5,
    )
    return finish(hf.InternVLForConditionalGeneration(made)), processor


@family
def internvl_gpt_oss():
    """Attention sinks, experts, and a sliding window in every other layer."""
    model, processor = tiny.internvl()
    like = model.config
    settings = text(len(processor.tokenizer), head_dim=16, num_local_experts=4, num_experts_per_tok=2)
    rope = {"rope_type": "default", "rope_theta": 1e4}
    made = hf.InternVLConfig(
        vision_config=like.vision_config,
        text_config=hf.GptOssConfig(**settings, sliding_window=8, layer_types=SLIDING, rope_parameters=rope),
        image_token_id=like.image_token_id,
        image_seq_length=16,
        downsample_ratio=0.5,
    )
    return finish(hf.InternVLForConditionalGeneration(made)), processor


def next_parts(**vision: Any) -> tuple[Any, Any, Callable[[str], int]]:
    tokenizer, number = words("<image>", "<video>", image_token="<image>", video_token="<video>")
    reader = images("llava_next", "LlavaNextImageProcessorPil")(
        size={"shortest_edge": 32}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS, **HALVES
    )
    return reader, tokenizer, number


@family
def llava_next():
    reader, tokenizer, number = next_parts()
    made = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(projection_dim=32, **VISION),
        text_config=hf.LlamaConfig(**text(len(tokenizer))),
        image_token_index=number("<image>"),
        image_seq_length=16,
        vision_feature_layer=-1,
        image_grid_pinpoints=PINPOINTS,
    )
    processor = hf.LlavaNextProcessor(
        image_processor=reader,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )
    return finish(hf.LlavaNextForConditionalGeneration(made)), processor


@family
def granite_vision():
    """Granite in LLaVA-NeXT, which multiplies what it adds to the residual stream."""
    _, processor = llava_next()
    tokenizer = processor.tokenizer
    factors = {"residual_multiplier": 0.22, "attention_multiplier": 0.3, "logits_scaling": 2.0}
    made = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(projection_dim=32, **VISION),
        text_config=hf.GraniteConfig(**text(len(tokenizer), embedding_multiplier=3.0, **factors)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_layer=-1,
        image_grid_pinpoints=PINPOINTS,
    )
    return finish(hf.LlavaNextForConditionalGeneration(made)), processor


@family
def llava_next_video():
    reader, tokenizer, number = next_parts()
    made = hf.LlavaNextVideoConfig(
        vision_config=hf.CLIPVisionConfig(projection_dim=32, **VISION),
        text_config=hf.LlamaConfig(**text(len(tokenizer))),
        image_token_index=number("<image>"),
        video_token_index=number("<video>"),
        image_seq_length=16,
        vision_feature_layer=-1,
        image_grid_pinpoints=PINPOINTS,
    )
    processor = image_side(hf.LlavaNextVideoProcessor)(
        image_processor=reader,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )
    return finish(hf.LlavaNextVideoForConditionalGeneration(made)), processor


@family
def llava_onevision():
    tokenizer, number = words("<image>", "<video>", image_token="<image>", video_token="<video>")
    made = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(vision_use_head=False, **VISION),
        text_config=hf.Qwen2Config(**text(len(tokenizer))),
        image_token_index=number("<image>"),
        video_token_index=number("<video>"),
        image_grid_pinpoints=PINPOINTS,
    )
    reader = images("llava_onevision", "LlavaOnevisionImageProcessorPil")(
        size=SQUARE, image_grid_pinpoints=PINPOINTS, **HALVES
    )
    processor = image_side(hf.LlavaOnevisionProcessor)(
        image_processor=reader,
        tokenizer=tokenizer,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template("<image>"),
    )
    return finish(hf.LlavaOnevisionForConditionalGeneration(made)), processor


IDEFICS = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
MARKS = tuple(f"<row_{row}_col_{col}>" for row in (1, 2) for col in (1, 2))
SPLITS = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}, **HALVES}


def idefics(config: str, model: str, tokenizer: Any) -> Any:
    made = getattr(hf, config)(
        vision_config=VISION,
        text_config=hf.LlamaConfig(**text(len(tokenizer))),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return finish(getattr(hf, model)(made))


@family
def idefics3():
    tokenizer, _ = words(*IDEFICS, *MARKS)
    reader = images("idefics3", "Idefics3ImageProcessorPil")(**SPLITS)
    processor = hf.Idefics3Processor(reader, tokenizer, image_seq_len=4, chat_template=template("<image>"))
    return idefics("Idefics3Config", "Idefics3ForConditionalGeneration", tokenizer), processor


@family
def smolvlm():
    """Its processor needs num2words."""
    tokenizer, _ = words(*IDEFICS, *MARKS)
    reader = images("smolvlm", "SmolVLMImageProcessorPil")(**SPLITS)

    def read(pictures):
        found = reader([[one] for one in pictures], return_tensors="pt", return_row_col_info=True)
        rows, cols = (found.pop(name) for name in ("rows", "cols"))
        run, fake = repeated("<image>", 4), IDEFICS[1]
        spelled = []
        for (down,), (across,) in zip(rows, cols, strict=True):
            marks = [f"{fake} <row_{r + 1}_col_{c + 1}> {run}" for r in range(down) for c in range(across)]
            spelled.append(" ".join([*marks, f"{fake} <global-img> {run} {fake}"]))
        return dict(found), spelled

    stand = Stand(tokenizer, "<image>", read)
    stand.image_processor, stand.image_seq_len, stand.fake_image_token = reader, 4, IDEFICS[1]
    return idefics("SmolVLMConfig", "SmolVLMForConditionalGeneration", tokenizer), stand


PIXTRAL = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")


def pixtral_parts(merge: int) -> tuple[Any, Any, Callable[[str], int]]:
    tokenizer, number = words(*PIXTRAL)
    side = 4 * merge
    reader = images("pixtral", "PixtralImageProcessorPil")(size={"longest_edge": 32}, patch_size=side, **HALVES)

    def read(pictures):
        found = reader(pictures, return_tensors="pt")
        spelled = []
        for height, width in found["image_sizes"]:
            row = repeated("[IMG]", int(width) // side)
            spelled.append(" [IMG_BREAK] ".join([row] * (int(height) // side)) + " [IMG_END]")
        return dict(found), spelled

    stand = Stand(tokenizer, "[IMG]", read)
    stand.patch_size, stand.spatial_merge_size = 4, merge
    stand.image_break_token, stand.image_end_token = PIXTRAL[1:]
    return stand, tokenizer, number


PIXTRAL_VISION = {**VISION, "model_type": "pixtral", "image_size": 64, "patch_size": 4}


@family
def pixtral():
    processor, tokenizer, number = pixtral_parts(1)
    made = hf.LlavaConfig(
        vision_config=PIXTRAL_VISION,
        text_config=hf.MistralConfig(**text(len(tokenizer), head_dim=16, sliding_window=None)),
        image_token_index=number("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return finish(hf.LlavaForConditionalGeneration(made)), processor


@family
def mistral3():
    processor, tokenizer, number = pixtral_parts(2)
    made = hf.Mistral3Config(
        vision_config=PIXTRAL_VISION,
        text_config=hf.MistralConfig(**text(len(tokenizer), head_dim=16, sliding_window=None)),
        image_token_index=number("[IMG]"),
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    return finish(hf.Mistral3ForConditionalGeneration(made)), processor
