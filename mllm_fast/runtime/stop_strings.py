"""Texts that end an answer, as a stopping criterion for transformers' `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

_MORE = 8  # tokens before the stop string that are decoded too, since characters may span several


def ended_by(text: str, last: str, stops: Sequence[str]) -> bool:
    """Return whether an answer ends with one of some texts.

    Args:
        text: The answer.
        last: The text of its last token, which may have more characters behind the stop string.
        stops: The texts.
    """
    return any(one in text[-len(one) - len(last) :] for one in stops)


class StopStrings(StoppingCriteria):
    """Ends each sequence when its answer ends with one of some texts.

    It reads the decoded answer, and so works with every tokenizer; transformers' own criterion takes some vocabularies
    apart wrongly or not at all, and looks into the prompt.

    Args:
        tokenizer: The tokenizer of the model.
        stops: The texts.
        length: The tokens of the prompt, padding included.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], length: int):
        self._tokenizer, self._stops, self._length = tokenizer, list(stops), length
        self._tokens = max(len(one.encode()) for one in self._stops) + _MORE  # a token has at least one byte

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return which sequences [B] are to end, bool [B]."""
        tails = input_ids[:, self._length :][:, -self._tokens :].tolist()
        return torch.tensor([self._ended(one) for one in tails], device=input_ids.device)

    def _ended(self, ids: list[int]) -> bool:
        text, last = (self._tokenizer.decode(some, skip_special_tokens=True) for some in (ids, ids[-1:]))
        return ended_by(text, last, self._stops)
