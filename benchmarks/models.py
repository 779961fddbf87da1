"""A LLaVA of random weights, as large as a benchmark needs it."""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import mllm_fast as mf
from mllm_fast.shapes.build import CHAT_TEMPLATE, build_tokenizer

_PATCH = 8


def random_llava(
    hidden: int,
    layers: int,
    heads: int,
    intermediate: int,
    grid: tuple[int, int],
    window: int,
    ends: bool = False,
    vocab: int | None = None,
    device: str | torch.device = "cpu",
) -> mf.VLM:
    """grid: rows and columns of the picture's tokens. ends: answers may end before the tokens asked for. vocab: words,
    those of the embedded model and made-up ones.

    The vision tower is not what is measured: each patch becomes its own token, without attention.
    """
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range((vocab or 0) - len(tokenizer))])
    rows, cols = grid
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=_PATCH * max(grid),
        patch_size=_PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=window,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaForConditionalGeneration(config).eval()
    model.model.get_image_features = _patches_as_tokens(model)
    if not ends:
        model.generation_config.eos_token_id = None
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"height": _PATCH * rows, "width": _PATCH * cols}, do_center_crop=False
        ),
        tokenizer=tokenizer,
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    return mf.VLM(model, processor)


def _patches_as_tokens(model):
    def features(pixel_values, **_):
        patches = model.model.vision_tower.embeddings.patch_embedding(pixel_values).flatten(2).mT
        return BaseModelOutputWithPooling(pooler_output=list(model.model.multi_modal_projector(patches)))

    return features
