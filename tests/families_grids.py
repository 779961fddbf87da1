"""Qwen and its relatives: a grid that follows the shape of the image. See families.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import transformers as hf
from family_kit import HALVES, VISION, Stand, family, finish, images, patches, repeated, template, text, words

from mllm_fast.models.loading import image_side

QWEN = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
DEEP = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 64,
}


def grid_images() -> Any:
    return images("qwen2_vl", "Qwen2VLImageProcessorPil")(
        size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64},
        patch_size=4,
        merge_size=2,
        temporal_patch_size=2,
        **HALVES,
    )


def qwen(config: str, model: str, processor: str, vision: dict, rope: list[int], **more: Any) -> tuple[Any, Any]:
    tokenizer, number = words(*QWEN)
    rotary = {"rope_type": "default", "mrope_section": rope, "rope_theta": 10000.0, **more.pop("rotary", {})}
    made = getattr(hf, config)(
        vision_config=vision,
        text_config=text(len(tokenizer), rope_parameters=rotary, **more),
        image_token_id=number(QWEN[0]),
        video_token_id=number(QWEN[1]),
        vision_start_token_id=number(QWEN[2]),
        vision_end_token_id=number(QWEN[3]),
    )
    kind = image_side(getattr(hf, processor))
    read = kind(
        image_processor=grid_images(), tokenizer=tokenizer, chat_template=template(" ".join(QWEN[i] for i in (2, 0, 3)))
    )
    return finish(getattr(hf, model)(made)), read


@family
def qwen2_vl():
    vision = {k: v for k, v in DEEP.items() if k in ("depth", "num_heads", "patch_size", "spatial_merge_size")}
    vision |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "temporal_patch_size": 2}
    return qwen("Qwen2VLConfig", "Qwen2VLForConditionalGeneration", "Qwen2VLProcessor", vision, [2, 3, 3])


@family
def qwen3_vl():
    vision, rotary = {**DEEP, "deepstack_visual_indexes": [0, 1]}, {"mrope_interleaved": True}
    names = "Qwen3VLConfig", "Qwen3VLForConditionalGeneration", "Qwen3VLProcessor"
    return qwen(*names, vision, [4, 2, 2], head_dim=16, rotary=rotary)


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@family
def qwen3_vl_moe():
    vision, rotary = {**DEEP, "deepstack_visual_indexes": [0, 1]}, {"mrope_interleaved": True}
    names = "Qwen3VLMoeConfig", "Qwen3VLMoeForConditionalGeneration", "Qwen3VLProcessor"
    return qwen(*names, vision, [4, 2, 2], head_dim=16, rotary=rotary, **MOE)


LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}


@family
def qwen3_5():
    rotary = {"mrope_interleaved": True, "partial_rotary_factor": 0.5}
    names = "Qwen3_5Config", "Qwen3_5ForConditionalGeneration", "Qwen3VLProcessor"
    return qwen(*names, DEEP, [2, 1, 1], head_dim=16, rotary=rotary, **LINEAR)


@family
def qwen3_5_moe():
    rotary = {"mrope_interleaved": True, "partial_rotary_factor": 0.5}
    names = "Qwen3_5MoeConfig", "Qwen3_5MoeForConditionalGeneration", "Qwen3VLProcessor"
    more = {**LINEAR, **MOE, "shared_expert_intermediate_size": 32}
    return qwen(*names, DEEP, [2, 1, 1], head_dim=16, rotary=rotary, **more)


GLM = ("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")


def glm(config: str, model: str, **more: Any) -> tuple[Any, Any]:
    tokenizer, number = words(*GLM)
    rotary = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    vision = {k: v for k, v in DEEP.items() if k != "num_position_embeddings"} | {"image_size": 32}
    names = ("image_token_id", "video_token_id", "image_start_token_id", "image_end_token_id")
    names += ("video_start_token_id", "video_end_token_id")
    made = getattr(hf, config)(
        vision_config=vision,
        text_config=text(len(tokenizer), rope_parameters=rotary, **more),
        **{name: number(token) for name, token in zip(names, GLM, strict=True)},
    )
    reader = images("glm4v", "Glm4vImageProcessorPil")(
        size={"shortest_edge": 2 * 16 * 16, "longest_edge": 2 * 64 * 64},
        patch_size=4,
        merge_size=2,
        temporal_patch_size=2,
        **HALVES,
    )
    processor = image_side(hf.Glm4vProcessor)(
        image_processor=reader, tokenizer=tokenizer, chat_template=template(" ".join(GLM[i] for i in (2, 0, 3)))
    )
    return finish(getattr(hf, model)(made)), processor


@family
def glm4v():
    return glm("Glm4vConfig", "Glm4vForConditionalGeneration")


@family
def glm4v_moe():
    more = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1}
    more |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 16}
    return glm("Glm4vMoeConfig", "Glm4vMoeForConditionalGeneration", **more)


@family
def kimi_k25():
    tokenizer, number = words("<image>", "<video>", "<vs>", "<ve>")
    made = hf.Kimi_K25Config(
        vision_config={**VISION, "pos_emb_height": 8, "pos_emb_width": 8},
        text_config={
            **text(len(tokenizer), num_key_value_heads=4),
            "model_type": "deepseek_v3",
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 2,
        },
        projection_hidden_size=32,
        image_token_id=number("<image>"),
        video_token_id=number("<video>"),
    )

    def read(pictures):
        cut = patches(pictures)
        found = {"pixel_values": cut.flatten(0, 1), "image_grid_thw": torch.tensor([[1, 4, 4]] * len(cut))}
        return found, [f"<vs> {repeated('<image>', 4)} <ve>"] * len(cut)

    stand = Stand(tokenizer, "<image>", read)
    stand.image_processor = SimpleNamespace(merge_size=2)
    return finish(hf.Kimi_K25ForConditionalGeneration(made)), stand
