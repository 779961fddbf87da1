"""Tiny random models of many architectures, of transformers' own classes, to show that a type needs no code of its own.

Processors are transformers' own where they can be built without torchvision. The others are `Stand` objects, which make
the inputs in the same form. `tiny.py` has the three families that most tests use.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from transformers import BatchFeature

from mllm_fast.models.loading import image_side

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
HALVES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SQUARE = {"height": 32, "width": 32}
PINPOINTS = [[32, 64], [64, 32], [64, 64]]
SLIDING = ["sliding_attention", "full_attention"] * 2
BUILD: dict[str, Callable[[], tuple[Any, Any]]] = {}


def family(build: Callable[[], tuple[Any, Any]]) -> Callable[[], tuple[Any, Any]]:
    BUILD[build.__name__] = build
    return build


def images(module: str, name: str) -> Any:
    """An image processor of transformers that works on PIL images alone."""
    return getattr(import_module(f"transformers.models.{module}.image_processing_pil_{module}"), name)


def build(name: str) -> tuple[Any, Any]:
    """A family's model and processor; the test is skipped if this release of transformers does not know it."""
    try:
        return BUILD[name]()
    except AttributeError as error:
        if "module transformers has no attribute" not in str(error):
            raise
        pytest.skip(str(error))


def text(vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def words(*special: str, **named: str) -> tuple[Any, Callable[[str], int]]:
    tokenizer = tiny.tokenizer(list(special), **named)
    return tokenizer, tokenizer.convert_tokens_to_ids


def template(image: str) -> str:
    return tiny._TEMPLATE.replace("IMAGE", image)


def finish(model: torch.nn.Module, seed: int = 0) -> Any:
    """Weights large enough that attention and logits are far from uniform; gains and biases not 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            owner, _, kind = name.rpartition(".")
            if p.ndim > 1:
                p.copy_(noise * (0.3 if p.ndim > 3 else 1.5 / p.shape[-1] ** 0.5))
            elif "norm" in owner and kind == "weight":
                p.copy_(gain(model.get_submodule(owner), p.shape[0]) + 0.2 * noise)
            else:
                p.copy_(0.2 * noise)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped one has no float64
    return model.eval()


def gain(norm: torch.nn.Module, width: int) -> float:
    """1 for a norm that multiplies by its weight, 0 for one that adds 1 to it."""
    weight = norm.weight
    weight.zero_()
    try:
        return float(not norm(torch.linspace(-1, 1, width, dtype=weight.dtype)[None]).any())
    except (TypeError, AttributeError):  # a gated norm, which takes a second argument
        return 1.0


class Stand:
    """A processor in the place of one that needs torchvision.

    Args:
        tokenizer: The tokenizer.
        read: From images to the model's inputs, and the text that stands for each image.
        mark: The placeholder in the template.
        kinds: The name of an input that marks image tokens with 1, or "".
    """

    def __init__(self, tokenizer: Any, image: str, read: Callable[[list], tuple[dict, list[str]]], kinds: str = ""):
        self.tokenizer, self.read, self.kinds = tokenizer, read, kinds
        self.image_token = image
        self.image_token_id = tokenizer.convert_tokens_to_ids(image)
        self.chat_template = template("IMAGE")

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool = True, **_: Any) -> str:
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def __call__(self, images: Any = None, text: Any = None, **options: Any) -> BatchFeature:
        texts, found = text if isinstance(text, list) else [text], {}
        if images is not None:
            flat = [one for each in (images if isinstance(text, list) else [images]) for one in each]
            found, spelled = self.read(flat)
            marks = iter(spelled)
            texts = ["".join(next(marks) if p == "IMAGE" else p for p in _split(one)) for one in texts]
        several = len(texts) > 1
        ids = self.tokenizer(texts, return_tensors="pt", padding=several, padding_side="left")
        found = {"input_ids": ids.input_ids, "attention_mask": ids.attention_mask, **found}
        if self.kinds:
            found[self.kinds] = (ids.input_ids == self.image_token_id).long()
        return BatchFeature(found)


def _split(line: str) -> list[str]:
    parts = line.split("IMAGE")
    return [piece for i, part in enumerate(parts) for piece in ((part, "IMAGE") if i + 1 < len(parts) else (part,))]


def pixels(pictures: list, side: int = 32) -> torch.Tensor:
    read = images("clip", "CLIPImageProcessorPil")(
        size={"height": side, "width": side}, crop_size={"height": side, "width": side}, **HALVES
    )
    return read(pictures, return_tensors="pt")["pixel_values"]


def patches(pictures: list, side: int = 32, patch: int = 8) -> torch.Tensor:
    """[images, patches, channels, patch, patch] in row-major order."""
    cut = pixels(pictures, side).unfold(2, patch, patch).unfold(3, patch, patch)
    return cut.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


def repeated(token: str, count: int) -> str:
    return " ".join([token] * count)


# Qwen and its relatives: a grid that follows the shape of the image

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


# one square, with or without tiles


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


# Gemma

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
