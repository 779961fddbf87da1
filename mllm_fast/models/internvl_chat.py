"""Checkpoints of InternVL's own code ("internvl_chat"), converted to transformers' InternVL.

Nothing of the folder is run: the weights, settings and vocabulary are read as data. One file of weights is in memory at
a time.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    GenerationConfig,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
)

from ..core.errors import InputError, first_line
from ..core.files import TEMPORARY
from .internvl_tokenizer import read_tokenizer
from .loading import failures, image_side

MODEL_TYPE = "internvl_chat"
_TEXT = {"internlm2": "llama", "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # theirs: transformers'
_VISION = (
    (r"embeddings\.class_embedding", "embeddings.cls_token"),
    (r"embeddings\.position_embedding", "embeddings.position_embeddings"),
    (r"embeddings\.patch_embedding\.", "embeddings.patch_embeddings.projection."),
    (r"encoder\.layers\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.", ".attention."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.ls([12])$", r".lambda_\1"),
)
_INTERNLM2 = (
    (r"tok_embeddings\.", "embed_tokens."),
    (r"\.attention\.wo\.", ".self_attn.o_proj."),
    (r"\.attention\.wqkv\.", ".self_attn.wqkv."),
    (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
    (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
    (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
)
_PROJECTOR = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}
_START, _END = "<|im_start|>{}\n", "<|im_end|>"  # of a turn; {} stands for the role
# what a config.json leaves out: configuration_internvl_chat.py of the authors' repository
_DEFAULTS: dict[str, Any] = {
    "model_type": None,
    "template": None,
    "llm_config": {},
    "vision_config": {},
    "ps_version": "v1",
    "use_thumbnail": False,
    "pad2square": False,
    "select_layer": -1,
    "downsample_ratio": 0.5,
    "dynamic_image_size": False,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 6,
}
# templates, with what they put between turns: conversation.py of the authors' repository
_BETWEEN = {"Hermes-2": "", "internlm2-chat": "", "internvl2_5": "\n"}


def convert(source: Path, target: Path, system: str | None = None) -> int:
    """Write a folder for `VLM.from_pretrained` from one in the layout of InternVL's own code.

    Args:
        source: A folder with config.json (model type "internvl_chat"), weights in .safetensors and a tokenizer, such as
            a copy of OpenGVLab/InternVL2-8B. Its Python files are not run.
        target: The folder to write; it does not exist yet.
        system: The system message of every conversation that brings none of its own. The authors' code has one in a
            Python file, which is not read; by default there is none.

    Returns:
        The number of tensors written.

    Raises:
        InputError: A file is missing or damaged, a setting is one that transformers' InternVL does not have, or the
            target exists.
    """
    if target.exists():
        raise InputError(f"{target}: exists already; give the name of a new folder")
    settings = _settings(source)
    config = _config(source, settings)
    tokenizer = read_tokenizer(source)
    with _new_folder(target) as folder:
        count = _write_weights(source, folder, config, settings)
        _write_processor(source, folder, settings, config, tokenizer, system)
        config.save_pretrained(folder)
        _generation(source, settings, tokenizer).save_pretrained(folder)
    return count


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Yield a folder that becomes the target when the block ends, and is gone if it fails."""
    if not target.parent.is_dir():
        raise InputError(f"{target}: the folder {target.parent} does not exist; make it first")
    folder = target.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
    try:
        folder.mkdir()
        yield folder
        folder.rename(target)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{target}: cannot be written: {first_line(error)}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _settings(source: Path) -> dict[str, Any]:
    """Return config.json, after checking what transformers' classes cannot express."""
    settings = _DEFAULTS | _object(source / "config.json")
    if settings["model_type"] != MODEL_TYPE:
        raise InputError(
            f"{source}: only models of the type {MODEL_TYPE!r} are converted, got {settings['model_type']!r}"
        )
    for key, wanted in (("ps_version", "v2"), ("use_thumbnail", True), ("pad2square", False)):
        if settings[key] != wanted:
            raise InputError(f"{source}: {key} is {settings[key]!r}; transformers' InternVL knows {wanted!r} alone")
    if settings["template"] not in _BETWEEN:
        raise InputError(
            f"{source}: the template of conversations is one of {', '.join(_BETWEEN)}, got {settings['template']!r}"
        )
    for key in ("llm_config", "vision_config"):
        if not isinstance(settings[key], dict):
            raise InputError(f"{source}: config.json: {key} is an object of settings, got {settings[key]!r}")
    for key in ("downsample_ratio", "min_dynamic_patch", "max_dynamic_patch"):
        if isinstance(settings[key], bool) or not isinstance(settings[key], (int, float)) or settings[key] <= 0:
            raise InputError(f"{source}: config.json: {key} is a number above 0, got {settings[key]!r}")
    kind = settings["llm_config"].get("model_type")
    if kind not in _TEXT:
        raise InputError(f"{source}: the language model is one of {', '.join(_TEXT)}, got {kind!r}")
    return settings


def _object(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds."""
    with failures(f"{path.parent}: {path.name}"):
        found = json.loads(path.read_bytes())
    if not isinstance(found, dict):
        raise InputError(f"{path.parent}: {path.name} holds an object of settings, got a {type(found).__name__}")
    return found


def _config(source: Path, settings: dict[str, Any]) -> Any:
    """Return transformers' config; the image token's id is set when the tokenizer is known."""
    text = dict(settings["llm_config"])
    kind = text.pop("model_type")
    text.pop("auto_map", None)
    if kind == "internlm2":
        text["attention_bias"] = text.pop("bias", False)
    tied = not any(re.fullmatch(r"language_model\.(lm_head|output)\.weight", name) for name in _shapes(source))
    text["tie_word_embeddings"] = tied
    vision = dict(settings["vision_config"])
    names = (
        ("qkv_bias", "attention_bias"),
        ("qk_normalization", "use_qk_norm"),
        ("dropout", "hidden_dropout_prob"),
    )
    for theirs, ours in names:
        if theirs in vision:
            vision[ours] = vision.pop(theirs)
    known = InternVLVisionConfig().to_dict()
    side = settings.get("force_image_size") or vision.get("image_size", 448)
    vision = {k: v for k, v in vision.items() if k in known and k != "model_type"} | {"image_size": [side, side]}
    patch, ratio = vision.get("patch_size", 14), float(settings["downsample_ratio"])
    with failures(f"{source}: config.json"):
        return InternVLConfig(
            architectures=["InternVLForConditionalGeneration"],
            text_config=AutoConfig.for_model(_TEXT[kind], **text),
            vision_config=InternVLVisionConfig(**vision),
            image_seq_length=int((side // patch * ratio) ** 2),
            downsample_ratio=ratio,
            vision_feature_layer=settings["select_layer"],
            tie_word_embeddings=tied,
            dtype=settings.get("torch_dtype"),
        )


def _files(source: Path) -> list[Path]:
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise InputError(f"{source}: the folder has no weights (*.safetensors); copy the model again")
    return files


def _shapes(source: Path) -> dict[str, list[int]]:
    """Return the shape of every tensor of the folder, from the heads of its files alone."""
    found: dict[str, list[int]] = {}
    for path in _files(source):
        with failures(str(path)), safe_open(path, "pt") as file:
            found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return found


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def _convert(name: str, tensor: torch.Tensor, config: Any, internlm2: bool) -> dict[str, torch.Tensor]:
    """Return what one tensor of the original becomes: itself under another name, or queries, keys and values apart."""
    part, _, rest = name.partition(".")
    if part == "vision_model":
        new = "model.vision_tower." + _renamed(rest, _VISION)
        if ".attention.qkv." in new:
            return {new.replace("qkv", f"{x}_proj"): t for x, t in zip("qkv", tensor.chunk(3), strict=True)}
        return {new: tensor}
    if part == "mlp1" and rest.split(".")[0] in _PROJECTOR:
        index, _, kind = rest.partition(".")
        return {f"model.multi_modal_projector.{_PROJECTOR[index]}.{kind}": tensor}
    if part != "language_model":
        raise InputError(f"the weights have a tensor {name!r}, which no part of InternVL is known to have")
    if rest in ("lm_head.weight", "output.weight"):
        return {"lm_head.weight": tensor}
    new = "model.language_" + (_renamed(rest, _INTERNLM2) if internlm2 else rest)
    if ".wqkv." not in new:
        return {new: tensor}
    text = config.text_config
    group = text.num_attention_heads // text.num_key_value_heads
    # each group of heads: its queries, then the key and the value that they share
    grouped = tensor.unflatten(0, (text.num_key_value_heads, group + 2, -1))
    parts = {"q": grouped[:, :group], "k": grouped[:, group], "v": grouped[:, group + 1]}
    return {new.replace("wqkv", f"{x}_proj"): t.reshape(-1, *tensor.shape[1:]) for x, t in parts.items()}


def _check_shapes(source: Path, config: Any, change: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]) -> None:
    """Raise InputError unless the weights are exactly those of the model that the config describes."""
    with torch.device("meta"), failures(f"{source}: config.json"):
        model = InternVLForConditionalGeneration(config)
    wanted = {name: list(t.shape) for name, t in model.state_dict().items()}
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    found: dict[str, list[int]] = {}
    for name, shape in _shapes(source).items():
        try:
            found |= {k: list(t.shape) for k, t in change(name, torch.empty(shape, device="meta")).items()}
        except RuntimeError:
            raise InputError(f"{source}: {name} has the shape {shape}, which config.json does not fit") from None
    for name in sorted(wanted.keys() ^ found.keys()):
        side = "lack" if name in wanted else "have more than config.json says,"
        raise InputError(f"{source}: the weights {side} what becomes {name}; copy the model again")
    for name, shape in wanted.items():
        if shape != found[name]:
            raise InputError(f"{source}: {name} is {shape} by config.json and {found[name]} in the weights")


def _write_weights(source: Path, folder: Path, config: Any, settings: dict[str, Any]) -> int:
    """Write each file of weights under the new names, and the index over them; return the number of tensors."""
    internlm2 = settings["llm_config"]["model_type"] == "internlm2"

    def change(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        return _convert(name, tensor, config, internlm2)

    _check_shapes(source, config, change)
    files, size = _files(source), 0
    places: dict[str, str] = {}
    for number, path in enumerate(files, 1):
        new = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        with failures(str(path)), safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensors |= {k: t.contiguous() for k, t in change(name, file.get_tensor(name)).items()}
        # chunks of one tensor share its memory, which a file cannot
        save_file({k: t.clone() if _shares(t) else t for k, t in tensors.items()}, folder / new, {"format": "pt"})
        places |= dict.fromkeys(tensors, new)
        size += sum(t.numel() * t.element_size() for t in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return len(places)


def _shares(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()


def _chat_template(settings: dict[str, Any], system: str | None) -> str:
    """Return a chat template in the form that the checkpoint was trained on; an image is followed by a new line."""
    end = _END + _BETWEEN[settings["template"]]
    opening, answer = _START.replace("{}", "' + message['role'] + '"), _START.replace("{}", "assistant")
    said = "" if system is None else _START.replace("{}", "system") + system + end
    quoted = json.dumps(said, ensure_ascii=False)  # Jinja reads an escaped pair of surrogates as two characters
    own = "{% if messages[0]['role'] != 'system' %}{{ " + quoted + " }}{% endif %}" if said else ""
    return (
        own + "{% for message in messages %}{{ '" + opening.replace("\n", "\\n") + "' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}"
        "{% elif part['type'] == 'video' %}{{ '<video>\\n' }}"
        "{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}{{ '" + end.replace("\n", "\\n") + "' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + answer.replace("\n", "\\n") + "' }}{% endif %}"
    )


def _write_processor(
    source: Path, folder: Path, settings: dict[str, Any], config: Any, tokenizer: Any, system: str | None
) -> None:
    images: dict[str, Any] = {}
    if (source / "preprocessor_config.json").is_file():
        images = _object(source / "preprocessor_config.json")
    height, width = config.vision_config.image_size
    vision = GotOcr2ImageProcessorPil(
        size={"height": height, "width": width},
        crop_to_patches=bool(settings["dynamic_image_size"]),
        min_patches=settings["min_dynamic_patch"],
        max_patches=settings["max_dynamic_patch"],
        image_mean=images.get("image_mean", [0.485, 0.456, 0.406]),
        image_std=images.get("image_std", [0.229, 0.224, 0.225]),
    )
    tokenizer.chat_template = _chat_template(settings, system)
    config.image_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    if config.image_token_id >= config.text_config.vocab_size:
        raise InputError(
            f"{source}: <IMG_CONTEXT> is token {config.image_token_id} of the tokenizer, and the model has"
            f" {config.text_config.vocab_size} tokens"
        )
    side = math.isqrt(config.image_seq_length)
    processor = image_side(InternVLProcessor)(image_processor=vision, tokenizer=tokenizer, image_seq_length=side * side)
    processor.save_pretrained(folder)


def _generation(source: Path, settings: dict[str, Any], tokenizer: Any) -> Any:
    """Return the settings of generation: it stops at the end of a turn, and wherever the original stops."""
    told: dict[str, Any] = {}
    if (source / "generation_config.json").is_file():
        told = _object(source / "generation_config.json")
    stops = told.get("eos_token_id") or []
    ends = {tokenizer.convert_tokens_to_ids(_END), tokenizer.eos_token_id}
    ends |= set(stops if isinstance(stops, list) else [stops])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return GenerationConfig(eos_token_id=sorted(e for e in ends if e is not None), pad_token_id=pad)
