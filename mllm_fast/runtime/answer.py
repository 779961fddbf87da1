"""What a model said: the text, its tokens and their places in the sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.layout import TokenLayout
from .detokenizer import token_texts


@dataclass(frozen=True)
class Answer:
    """What a model said. `token_ids` are the answer's, without the end-of-sequence token; `tokens` their
    texts; `input_ids` (int64 [N]) the whole sequence, answer included; `layout` its segments.

    `attention_share`: where it was asked for, the share of the generated tokens' attention that goes to each type
    of token, "system", "image", "query", "generated" -> float32 [layers, heads], a mean over the generated tokens
    that the model read; None if it read none.
    """

    text: str
    token_ids: list[int]
    tokens: list[str]
    layout: TokenLayout
    input_ids: Tensor
    attention_share: dict[str, Tensor] | None = None


def answer_of(
    sequence: Tensor,
    prompt: TokenLayout,
    tokenizer: Any,
    stop_ids: set[int],
) -> Answer:
    """The answer that follows the prompt in `sequence` (int64 [N], no padding before it)."""
    ids = sequence[prompt.prompt_length :].tolist()
    while ids and ids[-1] in stop_ids:
        ids.pop()
    kept = sequence[: prompt.prompt_length + len(ids)].cpu()
    layout = TokenLayout(len(kept), prompt.prompt_length, prompt.images)
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return Answer(text, ids, token_texts(tokenizer, ids), layout, kept)
