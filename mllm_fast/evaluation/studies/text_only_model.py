"""A language model without eyes, to be asked what a vision-language model is asked in words: the one it was tuned
from."""

from __future__ import annotations

from typing import Any

from ...core.errors import EndsRunError, InputError
from ...models.adapter import Adapter
from ...models.loading import failures, quiet
from ...models.offload import device_of
from ...vlm import VLM

ARCHITECTURES = ("llama", "mistral", "qwen2")


class TextOnly(Adapter):
    """A causal language model: there are no image tokens."""

    model_type = "text"
    text_types = ARCHITECTURES
    decoder = "model"


class TextProcessor:
    """What a VLM needs of a processor: the chat template of another one, so that both models read the same words, and a
    tokenizer."""

    image_token_id = -1

    def __init__(self, tokenizer: Any, template: Any):
        self.tokenizer = tokenizer
        self._template = template
        self.chat_template = template.chat_template

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        """The text of some messages."""
        return self._template.apply_chat_template(messages, **options)

    def __call__(self, images: Any, text: Any, **options: Any) -> Any:
        """Tokenized."""
        begun = isinstance(text, str) and self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token)
        return self.tokenizer(text, add_special_tokens=not begun, **options)


def load_text_model(name: str, like: VLM) -> VLM:
    """A causal language model of transformers, for prompts without images (image=None), in the device and dtype of
    another model and with its chat template.

    Raises:
        EndsRunError: it cannot be loaded, or is of an architecture that is not supported.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with failures(name), quiet():
            loaded = AutoModelForCausalLM.from_pretrained(name, dtype=like.model.dtype)
            tokenizer = AutoTokenizer.from_pretrained(name)
    except InputError as error:
        raise EndsRunError(str(error)) from None
    kind = loaded.config.model_type
    if kind not in ARCHITECTURES:
        raise EndsRunError(f"{name}: a text model is one of {', '.join(ARCHITECTURES)}, got {kind!r}")
    model: Any = loaded
    model = model.to(device_of(like.model)).eval()
    return VLM(model, TextProcessor(tokenizer, like.processor), adapter=TextOnly(), backend=like.backend)
