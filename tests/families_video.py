"""Tiny random models that take videos, with transformers' own processors, which need torchvision.

Their tokenizers know bytes, so that what a processor writes beside frames ("<0.5 seconds>", "Frame1: ") is spelled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf
from families_grids import DEEP, QWEN, grid_images
from family_kit import HALVES, PINPOINTS, SQUARE, VISION, finish, images, text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BUILD: dict[str, Callable[[], tuple[Any, Any]]] = {}
WIDE = {"max_position_embeddings": 8192}
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% elif part['type'] == 'video' %}VIDEO"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %} {% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def family(build: Callable[[], tuple[Any, Any]]) -> Callable[[], tuple[Any, Any]]:
    BUILD[build.__name__] = build
    return build


def letters(*special: str, **named: str) -> tuple[Any, Callable[[str], int]]:
    """A tokenizer of single bytes and some special tokens."""
    known = ["<pad>", "<s>", "</s>", "<unk>", *special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(known)}, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens=named,
    )
    made.add_tokens(list(special), special_tokens=True)
    return made, made.convert_tokens_to_ids


def template(image: str, video: str) -> str:
    return _TEMPLATE.replace("IMAGE", image).replace("VIDEO", video)


def qwen(config: str, model: str, kind: str, videos: Any, vision: dict, **more: Any) -> tuple[Any, Any]:
    tokenizer, number = letters(*QWEN)
    rotary = {"rope_type": "default", "rope_theta": 10000.0, **more.pop("rotary")}
    made = getattr(hf, config)(
        vision_config=vision,
        text_config=text(len(tokenizer), rope_parameters=rotary, **WIDE, **more),
        image_token_id=number(QWEN[0]),
        video_token_id=number(QWEN[1]),
        vision_start_token_id=number(QWEN[2]),
        vision_end_token_id=number(QWEN[3]),
    )
    marks = [f"{QWEN[2]}{QWEN[i]}{QWEN[3]}" for i in (0, 1)]
    processor = getattr(hf, kind)(
        image_processor=grid_images(), tokenizer=tokenizer, video_processor=videos, chat_template=template(*marks)
    )
    return finish(getattr(hf, model)(made)), processor


PATCHES = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, **HALVES}


@family
def qwen2_5_vl():
    videos = hf.Qwen2VLVideoProcessor(size={"shortest_edge": 16 * 16, "longest_edge": 48 * 48}, **PATCHES)
    vision = {k: v for k, v in DEEP.items() if k != "num_position_embeddings"}
    vision |= {"window_size": 16, "fullatt_block_indexes": [1], "tokens_per_second": 2}
    names = "Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLProcessor"
    return qwen(*names, videos, vision, rotary={"mrope_section": [2, 3, 3]})


@family
def qwen3_vl():
    size = {"shortest_edge": 16 * 16 * 2, "longest_edge": 48 * 48 * 8}
    vision = {**DEEP, "deepstack_visual_indexes": [0, 1]}
    names = "Qwen3VLConfig", "Qwen3VLForConditionalGeneration", "Qwen3VLProcessor"
    rotary = {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
    return qwen(*names, hf.Qwen3VLVideoProcessor(size=size, **PATCHES), vision, head_dim=16, rotary=rotary)


@family
def llava_onevision():
    tokenizer, number = letters("<image>", "<video>", image_token="<image>", video_token="<video>")
    vision = {**VISION, "image_size": 40}
    made = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(vision_use_head=False, **vision),
        text_config=hf.Qwen2Config(**text(len(tokenizer), **WIDE)),
        image_token_index=number("<image>"),
        video_token_index=number("<video>"),
        image_grid_pinpoints=[[40, 40], [40, 80], [80, 40]],
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    size = {"height": 40, "width": 40}
    reader = images("llava_onevision", "LlavaOnevisionImageProcessorPil")(
        size=size, image_grid_pinpoints=made.image_grid_pinpoints, **HALVES
    )
    processor = hf.LlavaOnevisionProcessor(
        image_processor=reader,
        tokenizer=tokenizer,
        video_processor=hf.LlavaOnevisionVideoProcessor(size=size, **HALVES),
        num_image_tokens=25,  # an odd side, which pooling rounds up
        vision_feature_select_strategy="full",
        chat_template=template("<image>", "<video>"),
    )
    return finish(hf.LlavaOnevisionForConditionalGeneration(made)), processor


@family
def llava_next_video():
    tokenizer, number = letters("<image>", "<video>", image_token="<image>", video_token="<video>")
    made = hf.LlavaNextVideoConfig(
        vision_config=hf.CLIPVisionConfig(projection_dim=32, **VISION),
        text_config=hf.LlamaConfig(**text(len(tokenizer), **WIDE)),
        image_token_index=number("<image>"),
        video_token_index=number("<video>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
    )
    size = {"size": {"shortest_edge": 32}, "crop_size": SQUARE}
    processor = hf.LlavaNextVideoProcessor(
        image_processor=images("llava_next", "LlavaNextImageProcessorPil")(
            image_grid_pinpoints=PINPOINTS, **size, **HALVES
        ),
        tokenizer=tokenizer,
        video_processor=hf.LlavaNextVideoVideoProcessor(do_center_crop=True, **size, **HALVES),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>", "<video>"),
    )
    return finish(hf.LlavaNextVideoForConditionalGeneration(made)), processor


@family
def internvl():
    marks = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    names = ("start_image_token", "end_image_token", "context_image_token", "video_token")
    tokenizer, number = letters(*marks, **dict(zip(names, marks, strict=True)))
    made = hf.InternVLConfig(
        vision_config={**VISION, "image_size": [32, 32], "patch_size": [4, 4]},
        text_config=hf.Qwen2Config(**text(len(tokenizer), **WIDE)),
        image_token_id=number("<IMG_CONTEXT>"),
        image_seq_length=16,
        downsample_ratio=0.5,
    )
    reader = images("got_ocr2", "GotOcr2ImageProcessorPil")(size=SQUARE, max_patches=6, crop_to_patches=True, **HALVES)
    processor = hf.InternVLProcessor(
        image_processor=reader,
        tokenizer=tokenizer,
        video_processor=hf.InternVLVideoProcessor(size=SQUARE, **HALVES),
        image_seq_length=16,
        chat_template=template("<IMG_CONTEXT>", "<video>"),
    )
    return finish(hf.InternVLForConditionalGeneration(made)), processor


@family
def smolvlm():
    fake, whole, end = "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"
    rows = [f"<row_{row}_col_{col}>" for row in (1, 2) for col in (1, 2)]
    named = {"image_token": "<image>", "video_token": "<video>", "fake_image_token": fake}
    named |= {"global_image_token": whole, "end_of_utterance_token": end}
    tokenizer, number = letters("<image>", "<video>", fake, whole, end, *rows, **named)
    made = hf.SmolVLMConfig(
        vision_config=VISION,
        text_config=hf.LlamaConfig(**text(len(tokenizer), **WIDE)),
        image_token_id=number("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    size = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 32}, **HALVES}
    processor = hf.SmolVLMProcessor(
        images("smolvlm", "SmolVLMImageProcessorPil")(do_image_splitting=False, **size),
        tokenizer,
        hf.SmolVLMVideoProcessor(num_frames=64, fps=1, **size),
        image_seq_len=4,
        chat_template=template("<image>", "<video>"),
    )
    return finish(hf.SmolVLMForConditionalGeneration(made)), processor


@family
def gemma3():
    """It has no video processor: frames are images."""
    marks = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
    tokenizer, number = letters(*marks, **dict(zip(("boi_token", "eoi_token", "image_token"), marks, strict=True)))
    made = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(vision_use_head=False, **{**VISION, "patch_size": 4}),
        text_config=hf.Gemma3TextConfig(
            **text(len(tokenizer), head_dim=16, sliding_window=1024, query_pre_attn_scalar=16, **WIDE)
        ),
        mm_tokens_per_image=16,
        image_token_index=number(marks[2]),
        boi_token_index=number(marks[0]),
        eoi_token_index=number(marks[1]),
    )
    reader = images("gemma3", "Gemma3ImageProcessorPil")(size=SQUARE, **HALVES)
    processor = hf.Gemma3Processor(
        image_processor=reader, tokenizer=tokenizer, image_seq_length=16, chat_template=template(marks[0], "?")
    )
    return finish(hf.Gemma3ForConditionalGeneration(made)), processor
