"""Load a text-only language model, for the textual questions that a vision-language model gets.

It is meant for the language model that the vision-language model was tuned from.
"""

from __future__ import annotations

from typing import Any

from ...core.errors import EndsRunError, InputError
from ...models.adapter import Adapter
from ...models.loading import failures, quiet
from ...models.offload import device_of
from ...vlm import VLM

ARCHITECTURES = ("llama", "mistral", "qwen2")


class TextProcessor:
    """A processor for text alone, with the parts that a VLM needs.

    Args:
        tokenizer: The tokenizer of the text model.
        template: Another model's processor. Its chat template is used, so that both models read the same words.
    """

    image_token_id = -1

    def __init__(self, tokenizer: Any, template: Any):
        self.tokenizer = tokenizer
        self._template = template
        self.chat_template = template.chat_template

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        """Return the text of some messages, as the chat template writes it."""
        return self._template.apply_chat_template(messages, **options)

    def __call__(self, images: Any, text: Any, **options: Any) -> Any:
        """Tokenize a text. Special tokens are added unless the text begins with the bos token."""
        begun = isinstance(text, str) and self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token)
        return self.tokenizer(text, add_special_tokens=not begun, **options)


def load_text_model(name: str, like: VLM) -> VLM:
    """Load a causal language model of transformers, for prompts without images (image=None).

    Args:
        name: The name or folder of the model.
        like: Another model. Its device, dtype, chat template and backend are used.

    Raises:
        EndsRunError: The model cannot be loaded, or its architecture is not supported.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with failures(name), quiet():
            loaded = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, dtype=like.model.dtype)
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except InputError as error:
        raise EndsRunError(str(error)) from None
    kind = loaded.config.model_type
    if kind not in ARCHITECTURES:
        raise EndsRunError(f"{name}: a text model is one of {', '.join(ARCHITECTURES)}, got {kind!r}")
    model: Any = loaded
    model = model.to(device_of(like.model)).eval()
    return VLM(model, TextProcessor(tokenizer, like.processor), adapter=Adapter(), backend=like.backend)
