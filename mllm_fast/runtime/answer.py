"""The answer of a model: its text, its tokens and their positions in the sequence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..core.errors import InputError
from ..core.layout import TokenLayout
from ..core.notebook import Displayed, axes, frame, table
from .detokenizer import token_texts
from .generation_settings import GenerationSettings
from .stop_strings import ended_by


@dataclass(frozen=True)
class Answer(Displayed):
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
        finish_reason: "stop" if the model, a stop string or a criterion of the caller's ended the answer, "length" if
            it was cut at the largest number of tokens, None if the answer was given, or is not at its end.
    """

    text: str
    token_ids: list[int]
    tokens: list[str]
    layout: TokenLayout
    input_ids: Tensor
    attention_share: dict[str, Tensor] | None = None
    unreached_layers: tuple[int, ...] = ()
    finish_reason: str | None = None

    def __repr__(self) -> str:
        return f"Answer({self.text!r}, {len(self.token_ids)} tokens, finish_reason={self.finish_reason!r})"

    def _repr_html_(self) -> str:
        rows: list[tuple[str, Any]] = [("answer", self.text), ("tokens", len(self.token_ids))]
        rows += [("finish_reason", self.finish_reason)] if self.finish_reason else []
        shares = self.attention_share or {}
        return table(rows + [(f"attention to {name}", f"{float(one.mean()):.0%}") for name, one in shares.items()])

    def to_frame(self) -> Any:
        """Return the tokens as a pandas DataFrame, with their ids, and the texts that they add to the answer."""
        return frame(zip(self.token_ids, self.tokens, strict=True), ["id", "text"])

    def plot(self, ax: Any = None) -> Any:
        """Draw where the generated tokens attend, layer by layer, and return the matplotlib axes.

        Raises:
            InputError: The answer was made without `attention_share`, or matplotlib is not installed.
        """
        if self.attention_share is None:
            raise InputError("the answer holds no shares of attention: give attention_share=True to generate")
        ax = axes(ax)
        for name, share in self.attention_share.items():
            ax.plot(share.mean(1).tolist(), label=name)
        ax.set(xlabel="layer", ylabel="share of the generated tokens' attention", ylim=(0, 1))
        ax.legend(frameon=False)
        return ax


def answer_of(
    sequence: Tensor, prompt: TokenLayout, tokenizer: Any, settings: GenerationSettings, limit: int | None = None
) -> Answer:
    """Return the answer that follows the prompt in a sequence.

    Args:
        sequence: Token ids of prompt and answer, int64 [N], without padding before the prompt.
        prompt: The layout of the prompt.
        tokenizer: The tokenizer of the model.
        settings: The settings of the answer. Tokens that end it are cut off its end.
        limit: The most tokens that the answer could have; None if that is not known.
    """
    ids = sequence[prompt.prompt_length :].tolist()
    count, stop_ids = len(ids), settings.stop_ids
    while ids and ids[-1] in stop_ids:
        ids.pop()
    # a criterion of the caller's, a text or a time limit may have ended it before the limit
    ended = len(ids) < count if limit is None else len(ids) < limit
    kept = sequence[: prompt.prompt_length + len(ids)].cpu()
    layout = replace(prompt, length=len(kept))
    text = tokenizer.decode(ids, skip_special_tokens=True)
    # the last token may have more letters than the text that ended the answer
    last = tokenizer.decode(ids[-1:], skip_special_tokens=True)
    ended = ended or ended_by(text, last, settings.stop_strings)
    reason = "stop" if ended else "length"
    return Answer(text.strip(), ids, token_texts(tokenizer, ids), layout, kept, finish_reason=reason)
