"""A tiny checkpoint in the layout of InternVL's own code, and that code's arithmetic in a few independent lines."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

WORDS = (  # noqa: SIM905
    "what color is the red green blue circle star a picture yes no two left of shape in image user assistant system"
).split()
MARKS = ("<|plugin|>", "<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>")
D, HEADS, LAYERS = 32, 2, 2  # vision
TD, THEADS, KV, TLAYERS, TFF = 48, 6, 2, 3, 64  # language


def sentencepiece_model(folder: Path, dummy_prefix: bool) -> int:
    """Train a small SentencePiece model and write it with its settings; return the number of pieces."""
    import sentencepiece

    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(WORDS, 8)) + str(rng.choice(list("?.:"))) for _ in range(400)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=dummy_prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    mark = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    added = {0: "<unk>", 1: "<s>", 2: "</s>"} | {pieces + i: m for i, m in enumerate(MARKS)}
    settings = {
        "tokenizer_class": "InternLM2Tokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "added_tokens_decoder": {str(i): mark | {"content": m} for i, m in added.items()},
        "additional_special_tokens": list(MARKS),
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return pieces


def config(vocabulary: int, language: str = "internlm2", wide: bool = False) -> dict:
    """The settings; `wide` has the norms of the vision tower of 6 billion parameters."""
    text = {
        "model_type": language,
        "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
        "vocab_size": vocabulary,
        "hidden_size": TD,
        "intermediate_size": TFF,
        "num_hidden_layers": TLAYERS,
        "num_attention_heads": THEADS,
        "num_key_value_heads": KV,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000,
        "rope_scaling": {"factor": 2.0, "type": "dynamic"},
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    if language == "internlm2":
        text["bias"] = False
    vision = {
        "model_type": "intern_vit_6b",
        "hidden_size": D,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": 32,
        "patch_size": 4,
        "qkv_bias": not wide,
        "qk_normalization": wide,
        "norm_type": "rms_norm" if wide else "layer_norm",
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
        "use_flash_attn": True,
        "drop_path_rate": 0.1,
    }
    return {
        "model_type": "internvl_chat",
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "llm_config": text,
        "vision_config": vision,
        "downsample_ratio": 0.5,
        "force_image_size": 32,
        "dynamic_image_size": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 6,
        "use_thumbnail": True,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internlm2-chat",
        "torch_dtype": "float32",
    }


def weights(settings: dict) -> dict[str, torch.Tensor]:
    """Random weights under the names of the authors' code."""
    vision, text = settings["vision_config"], settings["llm_config"]
    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.class_embedding": (1, 1, D),
        "vision_model.embeddings.position_embedding": (1, 65, D),
        "vision_model.embeddings.patch_embedding.weight": (D, 3, 4, 4),
        "vision_model.embeddings.patch_embedding.bias": (D,),
        "mlp1.0.weight": (4 * D,),
        "mlp1.0.bias": (4 * D,),
        "mlp1.1.weight": (TD, 4 * D),
        "mlp1.1.bias": (TD,),
        "mlp1.3.weight": (TD, TD),
        "mlp1.3.bias": (TD,),
    }
    for i in range(LAYERS):
        at = f"vision_model.encoder.layers.{i}."
        shapes |= {at + "ls1": (D,), at + "ls2": (D,), at + "norm1.weight": (D,), at + "norm2.weight": (D,)}
        shapes |= {at + "attn.qkv.weight": (3 * D, D), at + "attn.proj.weight": (D, D), at + "attn.proj.bias": (D,)}
        shapes |= {at + "mlp.fc1.weight": (48, D), at + "mlp.fc1.bias": (48,)}
        shapes |= {at + "mlp.fc2.weight": (D, 48), at + "mlp.fc2.bias": (D,)}
        if vision["qkv_bias"]:
            shapes[at + "attn.qkv.bias"] = (3 * D,)
        if vision["qk_normalization"]:
            shapes |= {at + "attn.q_norm.weight": (D,), at + "attn.k_norm.weight": (D,)}
        if vision["norm_type"] == "layer_norm":
            shapes |= {at + "norm1.bias": (D,), at + "norm2.bias": (D,)}
    size, head = text["vocab_size"], TD // THEADS
    if text["model_type"] == "internlm2":
        shapes |= {"language_model.model.tok_embeddings.weight": (size, TD), "language_model.output.weight": (size, TD)}
        for i in range(TLAYERS):
            at = f"language_model.model.layers.{i}."
            shapes |= {
                at + "attention.wqkv.weight": ((THEADS + 2 * KV) * head, TD),
                at + "attention.wo.weight": (TD, TD),
            }
            shapes |= {at + "feed_forward.w1.weight": (TFF, TD), at + "feed_forward.w3.weight": (TFF, TD)}
            shapes |= {at + "feed_forward.w2.weight": (TD, TFF)}
            shapes |= {at + "attention_norm.weight": (TD,), at + "ffn_norm.weight": (TD,)}
    else:
        shapes |= {"language_model.model.embed_tokens.weight": (size, TD), "language_model.lm_head.weight": (size, TD)}
        for i in range(TLAYERS):
            at = f"language_model.model.layers.{i}."
            for name, rows in (("q", THEADS), ("k", KV), ("v", KV)):
                shapes[f"{at}self_attn.{name}_proj.weight"] = (rows * head, TD)
                if text["model_type"] == "qwen2":
                    shapes[f"{at}self_attn.{name}_proj.bias"] = (rows * head,)
            shapes |= {at + "self_attn.o_proj.weight": (TD, TD), at + "mlp.down_proj.weight": (TD, TFF)}
            shapes |= {at + "mlp.gate_proj.weight": (TFF, TD), at + "mlp.up_proj.weight": (TFF, TD)}
            shapes |= {at + "input_layernorm.weight": (TD,), at + "post_attention_layernorm.weight": (TD,)}
    shapes["language_model.model.norm.weight"] = (TD,)
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        plain = "norm" in name or ".ls" in name
        made[name] = (plain * 1.0 + 0.2 * noise) if len(shape) == 1 else noise * 1.5 / math.sqrt(shape[-1])
    return made


def write(folder: Path, settings: dict, tensors: dict[str, torch.Tensor], files: int = 1) -> None:
    """Write the settings, a Python file that must not be run, and the weights in a number of files."""
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "configuration_internvl_chat.py").write_text("raise SystemExit('the code of the folder was run')\n")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2]}))
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]})
    )
    names = list(tensors)
    for i in range(files):
        save_file({n: tensors[n] for n in names[i::files]}, folder / f"model-{i + 1:05d}-of-{files:05d}.safetensors")


def _rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def image_features(settings: dict, w: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """[tiles, 3, 32, 32] -> [tiles, 16, TD], by the authors' steps."""
    vision = settings["vision_config"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        if vision["norm_type"] == "rms_norm":
            return _rms(x, w[name + ".weight"], 1e-6)
        return F.layer_norm(x, (D,), w[name + ".weight"], w[name + ".bias"], 1e-6)

    at = "vision_model.embeddings."
    x = F.conv2d(pixels, w[at + "patch_embedding.weight"], w[at + "patch_embedding.bias"], stride=4)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([w[at + "class_embedding"].expand(len(x), 1, D), x], 1) + w[at + "position_embedding"]
    for i in range(LAYERS):
        at = f"vision_model.encoder.layers.{i}."
        h = norm(at + "norm1", x)
        qkv = F.linear(h, w[at + "attn.qkv.weight"], w.get(at + "attn.qkv.bias"))
        q, k, v = qkv.reshape(len(x), -1, 3, HEADS, D // HEADS).permute(2, 0, 3, 1, 4)
        if vision["qk_normalization"]:
            q, k = (
                _rms(t.transpose(1, 2).flatten(2), w[at + f"attn.{n}_norm.weight"], 1e-6)
                .unflatten(2, (HEADS, -1))
                .transpose(1, 2)
                for n, t in (("q", q), ("k", k))
            )
        a = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(D // HEADS), -1) @ v
        a = F.linear(a.transpose(1, 2).flatten(2), w[at + "attn.proj.weight"], w[at + "attn.proj.bias"])
        x = x + a * w[at + "ls1"]
        h = F.gelu(F.linear(norm(at + "norm2", x), w[at + "mlp.fc1.weight"], w[at + "mlp.fc1.bias"]))
        x = x + F.linear(h, w[at + "mlp.fc2.weight"], w[at + "mlp.fc2.bias"]) * w[at + "ls2"]
    x = x[:, 1:].unflatten(1, (8, 8))  # rows, cols: two by two neighbours become one token, "v2" of the authors
    x = torch.stack([torch.stack([_four(t, r, c) for r in range(4) for c in range(4)]) for t in x])
    x = F.layer_norm(x, (4 * D,), w["mlp1.0.weight"], w["mlp1.0.bias"])
    return F.linear(F.gelu(F.linear(x, w["mlp1.1.weight"], w["mlp1.1.bias"])), w["mlp1.3.weight"], w["mlp1.3.bias"])


def _four(grid: torch.Tensor, row: int, col: int) -> torch.Tensor:
    """The channels of four neighbours: left and right of the upper row, then of the lower."""
    r, c = 2 * row, 2 * col
    return torch.cat([grid[r, c], grid[r, c + 1], grid[r + 1, c], grid[r + 1, c + 1]])


def internlm2_logits(w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """[tokens, TD] -> [tokens, vocabulary]: InternLM2 with its queries, keys and values in one matrix."""
    n, head, group = len(x), TD // THEADS, THEADS // KV
    frequency = 1e6 ** (-torch.arange(0, head, 2, dtype=torch.float64) / head)
    angle = torch.arange(n, dtype=torch.float64)[:, None] * frequency
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)

    def rotate(t: torch.Tensor) -> torch.Tensor:
        return t * cos + torch.cat([-t[..., head // 2 :], t[..., : head // 2]], -1) * sin

    mask = torch.full((n, n), -torch.inf, dtype=torch.float64).triu(1)
    for i in range(TLAYERS):
        at = f"language_model.model.layers.{i}."
        h = _rms(x, w[at + "attention_norm.weight"], 1e-5)
        qkv = (h @ w[at + "attention.wqkv.weight"].T).reshape(n, KV, group + 2, head)
        out = []
        for j in range(THEADS):
            q = rotate(qkv[:, j // group, j % group])
            k, v = rotate(qkv[:, j // group, -2]), qkv[:, j // group, -1]
            out.append(torch.softmax(q @ k.T / math.sqrt(head) + mask, -1) @ v)
        x = x + torch.cat(out, -1) @ w[at + "attention.wo.weight"].T
        h = _rms(x, w[at + "ffn_norm.weight"], 1e-5)
        gate = F.silu(h @ w[at + "feed_forward.w1.weight"].T) * (h @ w[at + "feed_forward.w3.weight"].T)
        x = x + gate @ w[at + "feed_forward.w2.weight"].T
    return _rms(x, w["language_model.model.norm.weight"], 1e-5) @ w["language_model.output.weight"].T
