"""The embedded detector's architecture, tokenizer and processor, built from transformers' own classes.

It is an OWL-ViT (arXiv 2205.06230) with the embedded model's grid.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import OwlViTConfig, OwlViTForObjectDetection, OwlViTProcessor, PreTrainedTokenizerFast

from .build import PATCH
from .scenes import CANVAS, COLORS, SHAPES

TEXT_WINDOW = 16  # tokens per query with its start and end token, as in the released OWL-ViT
_OTHER_WORDS = "a an the photo picture image of object".split()  # noqa: SIM905
# OWL-ViT reads a query at its token with the highest id, and takes a query that begins with id 0 for padding
_FIRST, _LAST = ("<pad>", "<unk>"), ("<s>", "</s>")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer over the words of queries; any other word is unknown."""
    words = [*_FIRST, *sorted({*_OTHER_WORDS, *COLORS, *SHAPES}), *_LAST]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[\s.,?!]+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(word, vocab[word]) for word in _LAST]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=TEXT_WINDOW,
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> OwlViTProcessor:
    """Build the detector's processor, for 96 x 96 pixels and queries padded to the text window."""
    # this name is torchvision's class if torchvision is installed, otherwise Pillow's
    from transformers import OwlViTImageProcessor

    image_processor = OwlViTImageProcessor(
        size={"height": CANVAS, "width": CANVAS}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return OwlViTProcessor(image_processor=image_processor, tokenizer=build_tokenizer())


def build_model(
    tokenizer: PreTrainedTokenizerFast,
    hidden_size: int = 128,
    vision_layers: int = 4,
    text_layers: int = 2,
    num_attention_heads: int = 4,
) -> OwlViTForObjectDetection:
    """Build an OWL-ViT with random weights, sized for the shapes, with one token per patch of the embedded model."""
    shared = {
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_attention_heads": num_attention_heads,
    }
    text = {
        **shared,
        "vocab_size": len(tokenizer),
        "num_hidden_layers": text_layers,
        "max_position_embeddings": TEXT_WINDOW,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {**shared, "num_hidden_layers": vision_layers, "image_size": CANVAS, "patch_size": PATCH}
    model = OwlViTForObjectDetection(OwlViTConfig(text_config=text, vision_config=vision, projection_dim=hidden_size))
    heads = model.class_head, model.box_head
    for layer in (part for head in heads for part in head.modules() if isinstance(part, nn.Linear)):
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)  # transformers leaves the deviation at 1
    nn.init.zeros_(model.box_head.dense2.weight)  # at first, a box is its patch
    for layer, bias in ((model.class_head.logit_scale, 9.0), (model.class_head.logit_shift, -0.5)):
        nn.init.zeros_(layer.weight)  # at first, objects are rare: logits of about -5
        nn.init.constant_(layer.bias, bias)
    return model
