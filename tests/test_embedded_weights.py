"""The embedded models' files are named as the hub's checkpoints are, and transformers reads every tensor of them."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration, OwlViTForObjectDetection

from mllm_fast.core.assets import SHAPES_JOINT, SHAPES_WEIGHTS
from mllm_fast.shapes.build import build_model, build_processor, hub_name, save

# the names that vLLM's LlavaForConditionalGeneration reads, and that transformers converts since the model is there
LLAVA = (
    r"language_model\.model\.(embed_tokens|norm)\.weight",
    r"language_model\.model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight",
    r"language_model\.model\.layers\.\d+\.(input|post_attention)_layernorm\.weight",
    r"multi_modal_projector\.linear_[12]\.(weight|bias)",
    r"vision_tower\.vision_model\.embeddings\.(class_embedding|(patch|position)_embedding\.weight)",
    r"vision_tower\.vision_model\.(pre_layrnorm|post_layernorm)\.(weight|bias)",  # "layrnorm" is the hub's spelling
    r"vision_tower\.vision_model\.encoder\.layers\.\d+\.(layer_norm[12]|mlp\.fc[12])\.(weight|bias)",
    r"vision_tower\.vision_model\.encoder\.layers\.\d+\.self_attn\.([qkv]|out)_proj\.(weight|bias)",
)
OWL = (
    r"owlvit\.(logit_scale|(visual|text)_projection\.weight)",
    r"owlvit\.(vision|text)_model\.(embeddings|encoder\.layers\.\d+)\..*",
    r"owlvit\.vision_model\.(pre|post)_layernorm\.(weight|bias)",
    r"owlvit\.text_model\.final_layer_norm\.(weight|bias)",
    r"(box_head\.dense[012]|class_head\.(dense0|logit_shift|logit_scale)|layer_norm)\.(weight|bias)",
)
MODELS = {
    "model": (SHAPES_WEIGHTS, LlavaForConditionalGeneration, LLAVA, hub_name),
    "detector": (SHAPES_JOINT / "detector", OwlViTForObjectDetection, OWL, str),
}


@pytest.mark.parametrize("which", MODELS)
def test_names_are_those_of_the_hub(which):
    folder, _, patterns, _ = MODELS[which]
    names = load_file(folder / "model.safetensors")
    strange = [name for name in names if not any(re.fullmatch(pattern, name) for pattern in patterns)]
    assert not strange
    unused = [pattern for pattern in patterns if not any(re.fullmatch(pattern, name) for name in names)]
    assert not unused


@pytest.mark.parametrize("which", MODELS)
def test_every_tensor_of_the_file_is_in_the_model(which):
    folder, cls, _, named = MODELS[which]
    stored = load_file(folder / "model.safetensors")
    model, report = cls.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not {kind: keys for kind, keys in report.items() if keys}
    state = {named(name): tensor for name, tensor in model.state_dict().items()}
    head = state.pop("language_model.lm_head.weight", None)  # tied to the embeddings, so that the file has it once
    assert set(state) == set(stored)
    for name, tensor in stored.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name
    assert head is None or torch.equal(head, stored["language_model.model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("name", "hubs"),
    [
        ("model.vision_tower.encoder.layers.0.mlp.fc1.bias", "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"),
        ("vision_tower.pre_layrnorm.bias", "vision_tower.vision_model.pre_layrnorm.bias"),
        ("model.vision_tower.vision_model.pre_layrnorm.bias", "vision_tower.vision_model.pre_layrnorm.bias"),
        ("model.language_model.norm.weight", "language_model.model.norm.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("model.multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_1.bias"),
    ],
)
def test_each_way_to_name_a_weight_gives_the_hubs(name, hubs):
    assert hub_name(name) == hubs
    assert hub_name(hubs) == hubs


def test_a_saved_model_has_the_same_names(tmp_path):
    processor = build_processor()
    model = build_model(processor.tokenizer).to(torch.bfloat16)
    save(model, processor, tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(load_file(SHAPES_WEIGHTS / "model.safetensors"))
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for (name, one), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
