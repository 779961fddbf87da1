"""Gemma, Cohere, LFM2, Molmo, Perception LM, Llama and Ovis. See families.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from family_kit import (
    HALVES,
    SLIDING,
    SQUARE,
    VISION,
    Stand,
    family,
    finish,
    images,
    patches,
    pixels,
    repeated,
    template,
    text,
    words,
)

from mllm_fast.models.loading import image_side

SIGLIP = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}


@family
def paligemma():
    tokenizer, number = words("<image>", image_token="<image>")
    reader = images("siglip", "SiglipImageProcessorPil")(size=SQUARE, **HALVES)
    reader.image_seq_length = 16
    processor = hf.PaliGemmaProcessor(reader, tokenizer, chat_template=template("<image>"))
    made = hf.PaliGemmaConfig(
        vision_config={**SIGLIP, "projection_dim": 64},
        text_config={**text(len(tokenizer), num_key_value_heads=1, head_dim=16), "model_type": "gemma"},
        projection_dim=64,
        hidden_size=64,
        image_token_index=number("<image>"),
    )
    return finish(hf.PaliGemmaForConditionalGeneration(made)), processor


@family
def paligemma2():
    """Soft caps of the scores and of the logits, and a norm behind the attention."""
    model, processor = paligemma()
    made = model.config
    capped = {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 30.0}
    settings = text(len(processor.tokenizer), head_dim=16, sliding_window=8, layer_types=SLIDING, **capped)
    made.text_config = hf.Gemma2Config(**settings)
    return finish(hf.PaliGemmaForConditionalGeneration(made)), processor


def gemma(window: int) -> tuple[Any, Any]:
    special = ("<boi>", "<eoi>", "<img>")
    tokenizer, number = words(*special, boi_token="<boi>", eoi_token="<eoi>", image_token="<img>")
    made = hf.Gemma3Config(
        vision_config=SIGLIP,
        text_config=text(
            len(tokenizer), head_dim=16, sliding_window=window, layer_types=SLIDING, query_pre_attn_scalar=16
        ),
        mm_tokens_per_image=4,
        boi_token_index=number("<boi>"),
        eoi_token_index=number("<eoi>"),
        image_token_index=number("<img>"),
    )
    reader = images("gemma3", "Gemma3ImageProcessorPil")(size=SQUARE, **HALVES)
    processor = hf.Gemma3Processor(
        image_processor=reader, tokenizer=tokenizer, chat_template=template("<boi>"), image_seq_length=4
    )
    return finish(hf.Gemma3ForConditionalGeneration(made)), processor


@family
def gemma3():
    return gemma(512)


@family
def gemma3_short():
    """A sliding window that is shorter than the prompt."""
    return gemma(8)


def gemma_4(**more: Any) -> tuple[Any, Any]:
    special = ("<boi>", "<eoi>", "<img>", "<|video|>", "<aud>")
    tokenizer, number = words(*special)
    settings = {"global_head_dim": 32, "hidden_size_per_layer_input": 0, "final_logit_softcapping": 30.0}
    settings |= {"use_bidirectional_attention": "vision", "vocab_size_per_layer_input": len(tokenizer)}
    made = hf.Gemma4Config(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "pooling_kernel_size": 2,
            "patch_size": 4,
            "position_embedding_size": 64,
        },
        text_config=text(len(tokenizer), head_dim=16, sliding_window=512, layer_types=SLIDING, **{**settings, **more}),
        audio_config=None,
        boi_token_id=number("<boi>"),
        eoi_token_id=number("<eoi>"),
        image_token_id=number("<img>"),
        video_token_id=number("<|video|>"),
        audio_token_id=number("<aud>"),
    )
    reader = images("gemma4", "Gemma4ImageProcessorPil")(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70)

    def read(pictures):
        found = reader(pictures, return_tensors="pt")
        counts = [int(n) for n in found["num_soft_tokens_per_image"]]
        inputs = {name: found[name] for name in ("pixel_values", "image_position_ids")}
        return inputs, [f"<boi> {repeated('<img>', count)} <eoi>" for count in counts]

    stand = Stand(tokenizer, "<img>", read, "mm_token_type_ids")
    stand.image_processor = reader
    return finish(hf.Gemma4ForConditionalGeneration(made)), stand


@family
def gemma4():
    return gemma_4()


@family
def gemma4_shared():
    """Layers that share keys and values, and inputs of their own for each layer."""
    return gemma_4(hidden_size_per_layer_input=16, num_kv_shared_layers=2, use_bidirectional_attention=None)


# Cohere, LFM2, Molmo, Llama, Ovis, Perception LM


@family
def cohere2_vision():
    tokenizer, number = words("<image>", "<boi>", "<eoi>")
    made = hf.Cohere2VisionConfig(
        vision_config=hf.SiglipVisionConfig(vision_use_head=False, **VISION),
        text_config=hf.Cohere2Config(logit_scale=0.25, sliding_window=512, layer_types=SLIDING, **text(len(tokenizer))),
        image_token_id=number("<image>"),
        downsample_factor=2,
        alignment_intermediate_size=64,
    )

    def read(pictures):
        found = pixels(pictures)
        run = f"<boi> {repeated('<image>', 4)} <eoi>"
        return {"pixel_values": found}, [run] * len(found)

    stand = Stand(tokenizer, "<image>", read)
    stand.boi_token, stand.eoi_token, stand.patch_size = "<boi>", "<eoi>", 2
    stand.image_processor = SimpleNamespace(crop_to_patches=False, max_patches=1)
    return finish(hf.Cohere2VisionForConditionalGeneration(made)), stand


@family
def aya_vision():
    special = ("<image>", "<soi>", "<eoi>", "<break>", "TILE_GLOBAL", *(f"TILE_{i}" for i in range(1, 7)))
    tokenizer, number = words(*special)
    made = hf.AyaVisionConfig(
        vision_config=hf.SiglipVisionConfig(vision_use_head=False, **VISION),
        text_config=hf.Cohere2Config(logit_scale=0.5, sliding_window=512, layer_types=SLIDING, **text(len(tokenizer))),
        image_token_index=number("<image>"),
        downsample_factor=2,
        alignment_intermediate_size=64,
        vision_feature_select_strategy="full",
    )
    reader = images("got_ocr2", "GotOcr2ImageProcessorPil")(size=SQUARE, max_patches=6, crop_to_patches=True, **HALVES)
    processor = hf.AyaVisionProcessor(
        image_processor=reader,
        tokenizer=tokenizer,
        patch_size=8,
        img_size=32,
        image_token="<image>",
        downsample_factor=2,
        start_of_img_token="<soi>",
        end_of_img_token="<eoi>",
        img_patch_token="<image>",
        img_line_break_token="<break>",
        tile_token="TILE",
        tile_global_token="TILE_GLOBAL",
        chat_template=template("<image>"),
    )
    return finish(hf.AyaVisionForConditionalGeneration(made)), processor


@family
def lfm2_vl():
    tokenizer, number = words("<image>", "<is>", "<ie>", "<thumb>")
    made = hf.Lfm2VlConfig(
        vision_config={
            **VISION,
            "model_type": "siglip2_vision_model",
            "num_patches": 16,
            "vision_use_head": False,
        },
        text_config={
            **text(len(tokenizer), block_multiple_of=8, block_auto_adjust_ff_dim=False),
            "model_type": "lfm2",
            "layer_types": ["conv", "full_attention"] * 2,
            "conv_L_cache": 3,
        },
        image_token_id=number("<image>"),
        downsample_factor=2,
        projector_hidden_size=48,
    )

    def read(pictures):
        cut = patches(pictures).permute(0, 1, 3, 4, 2).flatten(2)
        found = {"pixel_values": cut, "spatial_shapes": torch.tensor([[4, 4]] * len(cut))}
        found["pixel_attention_mask"] = torch.ones(len(cut), 16, dtype=torch.long)
        return found, [f"<is> {repeated('<image>', 4)} <ie>"] * len(cut)

    stand = Stand(tokenizer, "<image>", read)
    stand.image_processor = SimpleNamespace(downsample_factor=2, do_image_splitting=False)
    stand.image_start_token, stand.image_end_token = "<is>", "<ie>"
    return finish(hf.Lfm2VlForConditionalGeneration(made)), stand


@family
def molmo2():
    tokenizer, number = words("<image>", "<is>", "<ls>", "<ie>", "<fs>", "<fe>")
    made = hf.Molmo2Config(
        vision_config={
            **VISION,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "image_size": [32, 32],
            "num_position_embeddings": 16,
        },
        adapter_config={
            "vision_feature_layer": [-1, -2],
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 48,
            "text_hidden_size": 64,
        },
        text_config=text(len(tokenizer), head_dim=16, additional_vocab_size=8),
        image_start_token_id=number("<is>"),
        low_res_image_start_token_id=number("<ls>"),
        image_end_token_id=number("<ie>"),
        image_patch_id=number("<image>"),
        frame_start_token_id=number("<fs>"),
        frame_end_token_id=number("<fe>"),
    )

    def read(pictures):
        cut = patches(pictures).permute(0, 1, 3, 4, 2).flatten(2)
        pool = torch.arange(16).view(2, 2, 2, 2).permute(0, 2, 1, 3).reshape(4, 4)
        found = {"pixel_values": cut, "image_token_pooling": pool.repeat(len(cut), 1)}
        found["image_grids"] = torch.tensor([[0, 0, 2, 2]] * len(cut))
        found["image_num_crops"] = torch.ones(len(cut), dtype=torch.long)
        return found, [f"<ls> {repeated('<image>', 4)} <ie>"] * len(cut)

    return finish(hf.Molmo2ForConditionalGeneration(made)), Stand(tokenizer, "<image>", read, "mm_token_type_ids")


@family
def perception_lm():
    """Its vision tower is one of timm, its image processor needs torchvision."""
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    tokenizer, number = words("<|image|>", "<|video|>", image_token="<|image|>", video_token="<|video|>")
    tower = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": [32, 32], "patch_size": 8, "global_pool": ""}
    made = hf.PerceptionLMConfig(
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "vit_tiny_patch16_224",
            "do_pooling": False,
            "model_args": {**tower, "class_token": True},
        },
        text_config={**text(len(tokenizer)), "model_type": "llama"},
        vision_use_cls_token=True,
        projector_pooling_ratio=2,
        image_token_id=number("<|image|>"),
        video_token_id=number("<|video|>"),
    )
    reader = hf.PerceptionLMImageProcessor(tile_size=32, max_num_tiles=4, vision_input_type="thumb+tile", **HALVES)
    processor = image_side(hf.PerceptionLMProcessor)(
        image_processor=reader,
        tokenizer=tokenizer,
        patch_size=8,
        pooling_ratio=2,
        chat_template=template("<|image|>"),
    )
    return finish(hf.PerceptionLMForConditionalGeneration(made)), processor


@family
def mllama():
    tokenizer, number = words("<image>")
    made = hf.MllamaConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "vision_output_dim": 64,
            "max_num_tiles": 2,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        text_config=text(
            len(tokenizer), cross_attention_layers=[1, 3], rope_parameters={"rope_type": "default", "rope_theta": 1e4}
        ),
        image_token_index=number("<image>"),
    )

    def read(pictures):
        found = torch.stack([torch.stack([one, torch.zeros_like(one)]) for one in pixels(pictures)])[:, None]
        inputs = {"pixel_values": found, "aspect_ratio_ids": torch.ones(len(found), 1, dtype=torch.long)}
        inputs["aspect_ratio_mask"] = torch.tensor([[[1, 0]]] * len(found))
        return inputs, ["<image>"] * len(found)

    return finish(hf.MllamaForConditionalGeneration(made)), Stand(tokenizer, "<image>", read)


@family
def ovis2():
    special = ("<image>", "<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    tokenizer, number = words(*special, image_token="<IMG_ATOM>")
    made = hf.Ovis2Config(
        vision_config={**VISION, "vocab_size": 24, "hidden_stride": 2, "num_visual_indicator_tokens": 5},
        hidden_size=64,
        text_config=hf.Qwen2Config(**text(len(tokenizer))),
        image_token_id=number("<IMG_ATOM>"),
        visual_indicator_token_ids=[number(token) for token in special[2:]],
    )
    reader = images("ovis2", "Ovis2ImageProcessorPil")(size=SQUARE, crop_to_patches=True, max_patches=4, **HALVES)
    processor = hf.Ovis2Processor(
        image_processor=reader, tokenizer=tokenizer, image_seq_length=4, chat_template=template("<image>")
    )
    return finish(hf.Ovis2ForConditionalGeneration(made)), processor
