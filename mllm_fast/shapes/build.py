"""The embedded model's architecture, tokenizer and processor, built from transformers' own classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from .clip_questions import CLIP_WORDS, FRAME_NUMBERS
from .clips import CANVAS as CLIP_CANVAS
from .questions import WORDS
from .scenes import CANVAS

PATCH = 8
GRID = CANVAS // PATCH
CLIP_GRID = CLIP_CANVAS // PATCH
CLIP_WINDOW = 2048
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
_PUNCTUATION = (":", ",", ".", "?")
# from the names that a release of transformers may save to the names of the LLaVA checkpoints on the hub
_HUB_NAMES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.", ""),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
)
_MARK = "\u2581"  # SentencePiece's sign for "a word begins here"; it makes decoding exact

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# each frame of a clip is an image behind its number
_NUMBERED = (
    "{% set images = message['content'] | selectattr('type', 'equalto', 'image') | list %}"
    "{% set words = " + repr(list(FRAME_NUMBERS)) + " %}"
    "{% if images | length > words | length %}"
    "{{ raise_exception('this model reads at most ' ~ words[-1] ~ ' frames') }}"
    "{% endif %}"
    "{% for part in images %}"
    "frame {{ words[loop.index0] }} of {{ words[images | length - 1] }}: <image>\n"
    "{% endfor %}"
)
CLIP_TEMPLATE = CHAT_TEMPLATE.replace(
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}", _NUMBERED
)


def build_tokenizer(known: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer over the questions' words; text decodes to itself in lower case."""
    words = [*SPECIAL_TOKENS, *_PUNCTUATION, *(_MARK + word for word in known)]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=_MARK, prepend_scheme="always"),
            pre_tokenizers.Split(Regex(r"[:,.?]"), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement=_MARK, prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": "<image>"},
    )


def build_processor(
    known: Sequence[str] = WORDS, canvas: int = CANVAS, chat_template: str = CHAT_TEMPLATE
) -> LlavaProcessor:
    """Build an embedded model's processor, for images of `canvas` pixels a side and one token per patch of 8 x 8."""
    # this name is torchvision's class if torchvision is installed, otherwise Pillow's
    from transformers import CLIPImageProcessor

    image_processor = CLIPImageProcessor(
        size={"height": canvas, "width": canvas},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(known),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which "default" then drops
        chat_template=chat_template,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast,
    hidden_size: int = 128,
    num_hidden_layers: int = 6,
    num_attention_heads: int = 4,
    intermediate_size: int = 384,
    vision_layers: int = 3,
    canvas: int = CANVAS,
    window: int = 1024,
) -> LlavaForConditionalGeneration:
    """Build a LLaVA with random weights and tied embeddings, sized for the shapes."""
    vision = CLIPVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=vision_layers,
        num_attention_heads=num_attention_heads,
        image_size=canvas,
        patch_size=PATCH,
        projection_dim=hidden_size,
        hidden_act="quick_gelu",
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_attention_heads,
        max_position_embeddings=window,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=int(tokenizer.convert_tokens_to_ids("<image>")),  # type: ignore[arg-type]
        image_seq_length=(canvas // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


def build_clip_processor() -> LlavaProcessor:
    """Build the embedded video model's processor, which takes the frames of a clip as up to eight images."""
    return build_processor(CLIP_WORDS, CLIP_CANVAS, CLIP_TEMPLATE)


def build_clip_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Build the embedded video model with random weights."""
    return build_model(tokenizer, canvas=CLIP_CANVAS, window=CLIP_WINDOW)


def hub_name(name: str) -> str:
    """Return the name that the LLaVA checkpoints on the hub give a weight.

    Args:
        name: The name by which any release of transformers saves or holds it.

    Returns:
        The name in a file that every release of transformers and vLLM read, such as
        "vision_tower.vision_model.pre_layrnorm.weight".
    """
    for pattern, replacement in _HUB_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: str | Path) -> None:
    """Save a model and its processor, with the names of the hub's LLaVA checkpoints for the weights.

    The names that `save_pretrained` writes depend on the release of transformers, and vLLM and other releases do not
    read all of them.

    Args:
        model: The model.
        processor: Its processor.
        folder: The folder, made if it is not there.
    """
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    path = Path(folder) / "model.safetensors"
    named = {hub_name(name): tensor.clone() for name, tensor in load_file(path).items()}  # the file is still mapped
    save_file(named, path, {"format": "pt"})
