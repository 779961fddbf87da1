"""The answer of a model: its text, its tokens and their positions in the sequence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..core.layout import TokenLayout
from .detokenizer import token_texts


@dataclass(frozen=True)
class Answer:
    """The answer of a model to one prompt.

    Attributes:
        text: The decoded answer, without special tokens.
        token_ids: The token ids of the answer, without the end-of-sequence token.
        tokens: The text of each of these tokens.
        layout: The segments of the whole sequence.
        input_ids: The whole sequence, prompt and answer, int64 [N].
        attention_share: The share of the generated tokens' attention that goes to each type of token, if it was asked
            for. It maps "system", "image", "query" and "generated" to float32 [layers, heads], a mean over the
            generated tokens that the model read. It is None if the model read no generated token.
        unreached_layers: The layers that a knockout names and does not reach, because they have no attention and carry
            what they read in a state; see `Knockout.zero_inputs`.
    """

    text: str
    token_ids: list[int]
    tokens: list[str]
    layout: TokenLayout
    input_ids: Tensor
    attention_share: dict[str, Tensor] | None = None
    unreached_layers: tuple[int, ...] = ()


def answer_of(
    sequence: Tensor,
    prompt: TokenLayout,
    tokenizer: Any,
    stop_ids: set[int],
) -> Answer:
    """Return the answer that follows the prompt in a sequence.

    Args:
        sequence: Token ids of prompt and answer, int64 [N], without padding before the prompt.
        prompt: The layout of the prompt.
        tokenizer: The tokenizer of the model.
        stop_ids: Token ids that end an answer; they are cut off its end.
    """
    ids = sequence[prompt.prompt_length :].tolist()
    while ids and ids[-1] in stop_ids:
        ids.pop()
    kept = sequence[: prompt.prompt_length + len(ids)].cpu()
    layout = replace(prompt, length=len(kept))
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return Answer(text, ids, token_texts(tokenizer, ids), layout, kept)
