"""Tiny random models of the real classes, with real processors: one a family, all different in shape.

`vision_layers=0` makes each image token depend on its own patch alone, for tests of the pixel boxes. `eager`
is transformers' own attention in full float64: it casts its softmax to float32, which would hide errors
below 1e-7 (and gives NaN for padding rows, whose float64 mask value overflows there).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mllm_fast.models.loading import image_side
from mllm_fast.models.text_model import TextModel, text_model

FAMILIES = ("llava", "internvl", "qwen2_5_vl")
_WORDS = (  # noqa: SIM905
    "user assistant : , . ? what color is the circle red green blue a describe this picture yes no two three"
).split()
_TEMPLATE = (
    "{% for m in messages %}user : {% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE "
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %} assistant :"
)


@contextmanager
def eager(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the whole model runs on eager attention, in float64 if the model is; afterwards on SDPA."""
    softmax = torch.nn.functional.softmax

    def exact(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return softmax(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype)

    model.set_attn_implementation("eager")
    try:
        with mock.patch("torch.nn.functional.softmax", exact):
            yield
    finally:
        model.set_attn_implementation("sdpa")


def tokenizer(special: list[str], **named: str) -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *special, *_WORDS])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens=named,
    )
    fast.add_tokens(special, special_tokens=True)
    return fast


def _finish(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights large enough that attention and logits are far from uniform; gains and biases not 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                p.copy_(("norm" in name and "bias" not in name) + 0.2 * noise)
            else:
                p.copy_(noise * (1.5 / p.shape[-1] ** 0.5 if p.ndim == 2 else 0.3))
    return model.eval()


def llava(vision_layers: int = 2, seed: int = 0, heads: int = 3, layers: int = 3, width: int = 48):
    no_layers, vision_layers = vision_layers == 0, max(vision_layers, 1)  # LLaVA needs a layer to read from
    tok = tokenizer(["<image>"], image_token="<image>")
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=vision_layers,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=32,
    )
    text = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=width,
        intermediate_size=64 if width == 48 else 4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        attention_bias=True,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_layer=-1,
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tok,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE.replace("IMAGE", "<image>"),
    )
    model = _finish(LlavaForConditionalGeneration(config), seed)
    if no_layers:
        layer = model.model.vision_tower.encoder.layers[0]
        for last in (layer.self_attn.out_proj, layer.mlp.fc2):
            torch.nn.init.zeros_(last.weight)
    return model, processor


def internvl(vision_layers: int = 2, seed: int = 0):
    special = ["<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    tok = tokenizer(
        special,
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    vision = InternVLVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=vision_layers,
        num_attention_heads=2,
        image_size=[32, 32],
        patch_size=[4, 4],
    )
    text = Qwen2Config(
        vocab_size=len(tok),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tok.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=16,
        downsample_ratio=0.5,
    )
    images = GotOcr2ImageProcessorPil(
        size={"height": 32, "width": 32}, max_patches=6, crop_to_patches=True, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor = image_side(InternVLProcessor)(
        image_processor=images,
        tokenizer=tok,
        image_seq_length=16,
        chat_template=_TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>"),
    )
    return _finish(InternVLForConditionalGeneration(config), seed), processor


def sliding(window: int) -> TextModel:
    """A text part in float64 whose layers see a sliding window."""
    model = internvl()[0].double()
    text = model.model.language_model
    text.config.layer_types = ["sliding_attention"] * 3
    text.config.sliding_window = window
    text.has_sliding_layers = True
    for layer in text.layers:
        layer.self_attn.sliding_window = window
        layer.attention_type = "sliding_attention"
    return text_model(model, range(10, 30))


def qwen2_5_vl(vision_layers: int = 2, seed: int = 0):
    special = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tok = tokenizer(special)
    ids = {name: tok.convert_tokens_to_ids(name) for name in special}
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": vision_layers,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 16,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
        text_config={
            "vocab_size": len(tok),
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64},
        patch_size=4,
        merge_size=2,
        temporal_patch_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    template = _TEMPLATE.replace("IMAGE", "<|vision_start|> <|image_pad|> <|vision_end|>")
    processor = image_side(Qwen2_5_VLProcessor)(image_processor=images, tokenizer=tok, chat_template=template)
    return _finish(Qwen2_5_VLForConditionalGeneration(config), seed), processor


BUILD = {"llava": llava, "internvl": internvl, "qwen2_5_vl": qwen2_5_vl}
