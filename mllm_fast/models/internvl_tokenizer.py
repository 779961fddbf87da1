"""The tokenizer of a checkpoint of InternVL's own code, read without running its Python files."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import normalizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import SentencePieceExtractor

from ..core.errors import InputError
from ..core.extras import install_command
from .loading import failures, quiet

# what transformers' processor asks the tokenizer for
_NAMED = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


def read_tokenizer(source: Path) -> Any:
    """Return the tokenizer with the same ids as the original's, and the names that transformers' processor asks for.

    Args:
        source: The folder, with tokenizer.json, with vocab.json and merges.txt, or with InternLM2's tokenizer.model.

    Raises:
        InputError: A file is missing or damaged, or sentencepiece, which reads tokenizer.model, is not installed.
    """
    if (source / "tokenizer.json").is_file():
        kind: Any = PreTrainedTokenizerFast
    elif (source / "vocab.json").is_file():
        kind = Qwen2Tokenizer
    elif (source / "tokenizer.model").is_file():
        return _named(source, _from_sentencepiece(source))
    else:
        raise InputError(f"{source}: the folder has no tokenizer (tokenizer.json, vocab.json or tokenizer.model)")
    with failures(f"{source}: the tokenizer"), quiet():
        return _named(source, kind.from_pretrained(str(source), extra_special_tokens=_NAMED))


def _named(source: Path, tokenizer: Any) -> Any:
    """Check that the marks of images are tokens of the original; <video>, which is never seen by it, is added."""
    for mark in ("<img>", "</img>", "<IMG_CONTEXT>"):
        if tokenizer.convert_tokens_to_ids(mark) in (None, tokenizer.unk_token_id):
            raise InputError(f"{source}: the tokenizer has no token {mark}, as InternVL's has; copy the model again")
    tokenizer.padding_side = "left"
    return tokenizer


def _from_sentencepiece(source: Path) -> Any:
    """Return InternLM2's tokenizer: SentencePiece's pieces, and the marks under the ids that its settings give them."""
    if find_spec("sentencepiece") is None or find_spec("google.protobuf") is None:
        raise InputError(f"{source}: tokenizer.model is read by SentencePiece: {install_command('convert')}")
    with failures(f"{source}: the tokenizer"), quiet():
        prefix = SentencePieceExtractor(str(source / "tokenizer.model")).proto.normalizer_spec.add_dummy_prefix
        told = json.loads((source / "tokenizer_config.json").read_bytes())
        tokenizer = LlamaTokenizer.from_pretrained(
            str(source),
            add_prefix_space=prefix,
            add_bos_token=told.get("add_bos_token", True),  # the default of InternLM2's own class
            extra_special_tokens=_NAMED,
        )
        for index, token in (told.get("added_tokens_decoder") or {}).items():
            if tokenizer.convert_tokens_to_ids(token["content"]) != int(index):
                raise InputError(
                    f"{source}: {token['content']!r} is not token {index}, as tokenizer_config.json has it"
                )
    if prefix:  # a text that begins with a space gets another one, as SentencePiece gives it
        backend = tokenizer.backend_tokenizer
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    return tokenizer
